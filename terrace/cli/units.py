"""`terrace install-units`: terraced under systemd, and volumes as block devices at boot."""

from __future__ import annotations

import errno
from pathlib import Path

import click

from terrace.cli.context import Context, pass_context
from terrace.unitfiles import (
    DEFAULT_CONFIG,
    DEFAULT_HOME,
    State,
    Target,
    UnitError,
    enabled,
    remove,
    render,
    survey,
    this_installation,
    writable_by_others,
    write,
)


@click.command("install-units")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/"),
    metavar="DIR",
    help="Write below DIR instead of /, for an image or a package.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"The daemon's configuration (default: {DEFAULT_CONFIG}, if it exists).",
)
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--force", is_flag=True, help="Replace or remove files that were changed here, too.")
@click.option("--uninstall", is_flag=True, help="Remove the files.")
@pass_context
def install_units(
    context: Context, root: Path, config_file: Path | None, dry_run: bool, force: bool, uninstall: bool
) -> None:
    """Install systemd units and udev rules for the programs of this installation.

    terraced.service and terraced.socket run the daemon; terrace-attach@.service makes a volume a block device at
    boot; the rules name it /dev/terrace/POOL/VOL. Running it again brings the files to this version.
    """
    from terrace.config import load_config
    from terrace.schema import ConfigError

    root = root.absolute()
    if config_file is None and (root / DEFAULT_CONFIG.relative_to("/")).exists():
        config_file = DEFAULT_CONFIG
    readable = config_file
    if config_file is not None:
        config_file = config_file.absolute()
        readable = root / config_file.relative_to("/")
        if not readable.exists():
            readable = config_file
    try:
        config = load_config(readable)
    except ConfigError as error:
        raise UnitError(errno.EINVAL, "; ".join(error.problems)) from None
    home = context.home.path if context.chosen else DEFAULT_HOME
    installation = this_installation(home, config_file, config)
    targets = survey(root, render(installation))
    if uninstall:
        _uninstall(root, targets, dry_run=dry_run, force=force)
        return
    changed = [target for target in targets if target.state is State.CHANGED]
    pending = [target for target in targets if target.state is not State.CURRENT]
    for target in pending:
        if dry_run or target.state is not State.MISSING:
            click.echo(f"{target.shown}: {'would be ' if dry_run else 'is to be '}{_verb(target)}")
            click.echo(target.difference())
    if changed and not force:
        raise UnitError(
            errno.EEXIST,
            f"changed here, as shown, so nothing was written: {', '.join(str(target.shown) for target in changed)}; "
            "move the changes to where they stay, with `systemctl edit UNIT`, then give --force",
        )
    if dry_run:
        return
    write(pending)
    for target in pending:
        click.echo(f"{target.shown}: {_verb(target)}")
    exposed = writable_by_others(installation.programs / "terraced")
    if exposed is not None:
        click.echo(
            f"Warning: {exposed} can be changed by others than root, and what lies there will run as root; "
            "install Terrace below /opt or with `pipx install --global`.",
            err=True,
        )
    if config.fuse.mountpoint:
        click.echo(
            f"Warning: {config.fuse.mountpoint}, the mountpoint under [fuse], can't be mounted in the sandbox of "
            f"terraced.service; run `terrace mount {config.fuse.mountpoint}` as a service of its own.",
            err=True,
        )
    if not pending:
        click.echo("Everything is installed as it should be.")
        return
    if root == Path("/"):
        click.echo("\n  ".join(("Next:", *_next_steps(pending))))


def _next_steps(written: list[Target]) -> list[str]:
    """`written`: as it was before."""
    replaced = {target.path.name for target in written if target.state is not State.MISSING}
    both = "terraced.socket terraced.service"
    steps = ["systemctl daemon-reload", "udevadm control --reload"]
    if "terraced.socket" in replaced:  # systemd lets nobody restart the socket alone while the service runs
        return [*steps, f"systemctl stop {both}", f"systemctl start {both}"]
    if "terraced.service" in replaced:
        return [*steps, "systemctl restart terraced.service"]
    return [*steps, f"systemctl enable --now {both}"]


def _verb(target: Target) -> str:
    return "written" if target.state is State.MISSING else f"replaced, being {target.state.value}"


def _uninstall(root: Path, targets: list[Target], *, dry_run: bool, force: bool) -> None:
    there = [target for target in targets if target.state is not State.MISSING]
    if not there:
        click.echo("Nothing is installed.")
        return
    links = enabled(root)
    if links and not force:
        raise UnitError(
            errno.EBUSY, f"still enabled: {', '.join(links)}; first `systemctl disable --now {' '.join(links)}`"
        )
    changed = [str(target.shown) for target in there if target.state is State.CHANGED]
    if changed and not force:
        raise UnitError(
            errno.EEXIST, f"{', '.join(changed)}: changed here, so nothing was removed; --force removes them too"
        )
    for target in there:
        click.echo(f"{target.shown}: {'would be ' if dry_run else ''}removed")
    if not dry_run:
        remove(there)
        if root == Path("/"):
            click.echo("Next:\n  systemctl daemon-reload\n  udevadm control --reload")
