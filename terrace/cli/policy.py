"""`terrace policy`: check a configuration file's policies, and see and reload those of the daemon."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from terrace.cli.context import Context, ask, pass_context
from terrace.cli.output import complain, output_option, show_json, show_table
from terrace.cli.simulate import simulate


class PolicyType(click.ParamType[str]):
    """A policy's name, completed from those that the daemon knows."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [policy["name"] for policy in ask(ctx, "policies")]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


POLICY = PolicyType()


@click.group()
def policy() -> None:
    """Policies: where a volume's blocks live, how fast it may go, and what it does when there is no room."""


policy.add_command(simulate)


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@output_option
def check(file: Path, output: str) -> None:
    """Say whether the configuration in FILE is good. Needs no daemon."""
    from terrace.config import load_config
    from terrace.schema import ConfigError

    try:
        config = load_config(file)
    except ConfigError as error:
        *others, last = error.problems
        for problem in others:
            complain(problem)
        raise click.ClickException(last) from None
    if output == "json":
        show_json([dataclasses.asdict(config.show_policy(name)) for name in config.policy])
    else:
        click.echo(f"{file}: good; policies: {', '.join(config.policy) or 'none'}")


@policy.command("list")
@output_option
@pass_context
def list_policies(context: Context, output: str) -> None:
    """List the daemon's policies, and how many volumes have each."""
    with context.connect() as client:
        policies = client.get("policies")
    if output == "json":
        show_json(policies)
        return
    rows = [(found["name"], len(found["volumes"]) or "-", _in_short(found)) for found in policies]
    show_table(("Policy", ">Volumes", "Differs from the defaults in"), rows, empty="There are no policies.")


@policy.command()
@click.argument("name", type=POLICY)
@output_option
@pass_context
def show(context: Context, name: str, output: str) -> None:
    """Show the values of a policy that are in force, and which of them are defaults."""
    with context.connect() as client:
        found = client.get("policies", name)
    if output == "json":
        show_json(found)
        return
    rows = [(key, _as_toml(value), "" if key in found["given"] else "default") for key, value in found["keys"].items()]
    show_table((f"[policy.{found['name']}]", "Value", ""), rows, empty="")
    click.echo(f"Volumes: {', '.join(found['volumes']) or 'none'}")


@policy.command()
@output_option
@pass_context
def reload(context: Context, output: str) -> None:
    """Let the daemon read its policies anew. A file with an error changes nothing."""
    with context.connect() as client:
        done = client.request("POST", "policies", "reload")
    if output == "json":
        show_json(done)
        return
    parts = [f"{what}: {', '.join(done[what])}" for what in ("added", "changed", "removed") if done[what]]
    click.echo(f"Policies reloaded from {done['file']}: {'; '.join(parts) or 'nothing changed'}.")
    if done["needs_restart"]:
        click.echo(f"What changed under {_sections(done['needs_restart'])} takes effect when terraced is restarted.")


def _sections(names: Sequence[str]) -> str:
    return ", ".join(f"[{name}]" for name in names)


def _in_short(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_as_toml(found['keys'][key])}" for key in found["given"]) or "-"


def _as_toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
