"""`terrace pool evacuate`: empty a device and take it out of its pool, or give up one that is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.context import POOL, Context, confirm, pass_context
from terrace.cli.output import duration, output_option, patience, percent, show_json, show_table
from terrace.sizes import format_size

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient

_POLL_S = 0.5
_SHOWN_RANGES = 20


@click.command()
@click.argument("name", type=POOL)
@click.argument("device", required=False, type=click.Path(), metavar="DEV")
@click.option("--wait", is_flag=True, help="Stay until it is over, and show how far it is.")
@click.option("--status", is_flag=True, help="Only show the evacuations, and what is lost.")
@click.option("--cancel", is_flag=True, help="Let the device be used again; what was moved stays moved.")
@click.option("--lost", is_flag=True, help="The device is gone for good: WHAT IS ONLY THERE IS LOST.")
@click.option("--truncate-log", is_flag=True, help="With --lost: the newest part of the log too, if it was there.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask before giving a device up.")
@output_option
@pass_context
def evacuate(
    context: Context,
    name: str,
    device: str | None,
    wait: bool,
    status: bool,
    cancel: bool,
    lost: bool,
    truncate_log: bool,
    yes: bool,
    output: str,
) -> int:
    """Empty a device and remove it from its pool, while that is in use.

    The daemon does it in the background and goes on after a restart. What a failing device doesn't give any more is
    lost, and listed. With --lost the pool is opened without a device that is gone; what was only there reads as EIO
    until it is written again, everything else lives.
    """
    if status + cancel + lost > 1 or (wait and (status or cancel)):
        raise click.UsageError("--status, --cancel and --lost stand alone; --wait is for starting")
    if truncate_log and not lost:
        raise click.UsageError("--truncate-log goes with --lost")
    if (device is None) != status:
        raise click.UsageError("name a device of the pool" if device is None else "--status shows all devices")
    if lost:
        confirm(f"Give up {device} of pool {name} for good, with all that is only there?", yes=yes)
    from terrace.apiclient import NotRunningError

    try:
        with context.connect() as client:
            found = _ask(client, name, device, wait or lost, cancel, lost, truncate_log)
    except NotRunningError:
        if status or cancel:
            raise
        from terrace.cli.offline import evacuate_offline

        path = str(Path(str(device)).absolute())
        with patience(f"Evacuating {path}") as advance:
            found = evacuate_offline(context.home, name, path, lost=lost, truncate_log=truncate_log, advance=advance)
        device, wait = path, True
    if output == "json":
        show_json(found)
        return _exit_status(found, device, waited=wait or lost)
    if status:
        show_evacuations(name, found)
        return 0
    (newest,) = [one for one in found["evacuations"] if _same(one["path"], str(device))][-1:] or [None]
    if newest is not None:
        click.echo(_sentence(name, newest))
    if found.get("given_up"):
        click.echo(f"Pool {name}: {found['given_up']}.")
    if wait or lost:
        show_losses(found["losses"])
    return _exit_status(found, device, waited=wait or lost)


def _exit_status(found: dict[str, Any], device: str | None, *, waited: bool) -> int:
    if not waited or device is None:
        return 0
    return 0 if any(one["state"] == "removed" for one in found["evacuations"] if _same(one["path"], device)) else 1


def _ask(
    client: ApiClient, name: str, device: str | None, wait: bool, cancel: bool, lost: bool, truncate_log: bool
) -> dict[str, Any]:
    if device is None:
        return dict(client.get("pools", name, "evacuate"))
    known = [one["path"] for one in client.get("pools", name).get("devices", [])]
    path = next((one for one in known if _same(one, device)), str(Path(device).absolute()))
    action = "cancel" if cancel else "lost" if lost else "start"
    body = {"device": path, "action": action} | ({"truncate_log": True} if truncate_log else {})
    with patience(f"Evacuating {path}") as advance:
        found = client.request("POST", "pools", name, "evacuate", body=body)
        try:
            while wait and (running := [one for one in found["evacuations"] if _is_running(one, path)]):
                if running[0]["total_bytes"]:
                    advance(running[0]["done_bytes"], running[0]["total_bytes"])
                time.sleep(_POLL_S)
                found = client.get("pools", name, "evacuate")
        except KeyboardInterrupt:
            raise click.ClickException(
                f"no longer watching; the evacuation goes on: terrace pool evacuate {name} {path} --cancel ends it"
            ) from None
    return dict(found)


def _is_running(one: dict[str, Any], path: str) -> bool:
    return bool(one["path"] == path and one["state"] in ("running", "waiting"))


def _same(one: str, other: str) -> bool:
    """Whether two paths name one device, in the eyes of this process."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _sentence(name: str, one: dict[str, Any]) -> str:
    """What is with an evacuation."""
    path, state = one["path"], one["state"]
    if state == "removed":
        bad = f"; {one['bad_blocks']} blocks could not be read" if one["bad_blocks"] else ""
        what = "is given up and forgotten" if one["lost"] else "is empty and no longer part of"
        return f"{path} {what} {'by ' if one['lost'] else ''}pool {name}{bad}."
    if state == "cancelled":
        return f"The evacuation of {path} is cancelled; pool {name} uses it again."
    if state == "stuck":
        return f"{path} can't be emptied for now: {one['problem']}."
    left = format_size(one["total_bytes"] - one["done_bytes"])
    return f"{path} of pool {name} is being emptied, {left} to go; terrace pool evacuate {name} --status follows it."


def brief(one: dict[str, Any]) -> str:
    """For `pool show`: one line."""
    share = percent(one["done_bytes"], one["total_bytes"])
    if one["state"] == "running":
        speed = f", {format_size(int(one['bytes_per_s']))}/s" if one["bytes_per_s"] else ""
        eta = f", ETA {duration(one['eta_s'])}" if one["eta_s"] is not None else ""
        return f"{one['path']}: {share} of {format_size(one['total_bytes'])}{speed}{eta}"
    waits = {"waiting": "waits for room", "stuck": f"stuck: {one['problem']}"}
    return f"{one['path']}: {waits.get(one['state'], one['state'])}" + (
        f", {share}" if one["state"] == "waiting" else ""
    )


def show_evacuations(name: str, found: dict[str, Any]) -> None:
    """All of them, and what is lost."""
    rows = [
        (
            one["path"],
            one["state"] + (" (lost)" if one["lost"] and one["state"] != "removed" else ""),
            percent(one["done_bytes"], one["total_bytes"]) if one["total_bytes"] else "-",
            format_size(one["done_bytes"]),
            format_size(one["total_bytes"]),
            duration(one["eta_s"]) if one["eta_s"] is not None else "-",
            one["bad_blocks"] or "-",
        )
        for one in found["evacuations"]
    ]
    columns = ("Device", "State", ">Done", ">Moved", ">Of", ">ETA", ">Unreadable")
    show_table(columns, rows, empty=f"No device of pool {name} was evacuated since it was opened.")
    for one in found["evacuations"]:
        if one["problem"]:
            click.echo(one["problem"])
    show_losses(found["losses"])


def show_losses(losses: list[dict[str, Any]]) -> None:
    """What is lost: by volume, and the first ranges by name."""
    if not losses:
        return
    by_volume: dict[str, list[dict[str, Any]]] = {}
    for loss in losses:
        by_volume.setdefault(loss["volume"], []).append(loss)
    click.echo()
    show_table(
        ("Volume", ">Lost", ">Ranges"),
        [(volume, format_size(sum(one["length"] for one in ones)), len(ones)) for volume, ones in by_volume.items()],
    )
    click.echo()
    shown = losses[:_SHOWN_RANGES]
    rows = [(one["volume"], one["offset"], one["offset"] + one["length"] - 1) for one in shown]
    show_table(("Lost of", ">From byte", ">To byte"), rows)
    if len(losses) > len(shown):
        click.echo(f"... and {len(losses) - len(shown)} more: -o json lists them all.")
    click.echo("\nThese ranges read as EIO. Write or trim them and they are sound again; restore them from a copy.")
