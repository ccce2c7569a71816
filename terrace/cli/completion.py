"""`terrace completion`: the script that teaches a shell to complete commands, pools and volumes."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    bash: eval "$(terrace completion bash)" in ~/.bashrc;
    zsh: eval "$(terrace completion zsh)" in ~/.zshrc;
    fish: terrace completion fish > ~/.config/fish/completions/terrace.fish
    """
    complete = get_completion_class(shell)
    assert complete is not None
    if shell == "bash":
        # By default bash takes what stands before and after an @ for words of their own.
        click.echo("COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}")
    click.echo(complete(context.find_root().command, {}, "terrace", "_TERRACE_COMPLETE").source())
