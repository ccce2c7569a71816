"""`terrace pool`: create, list, show, grow, check, open and delete pools."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.context import DEVICE, POOL, SIZE, Context, confirm, pass_context
from terrace.cli.evacuate import brief as brief_evacuation
from terrace.cli.evacuate import evacuate
from terrace.cli.mirrorbrief import brief as brief_mirror
from terrace.cli.output import count, output_option, patience, percent, show_facts, show_json, show_table
from terrace.cli.scrub import brief, is_well, scrub_facts, show_scrub, verdict
from terrace.sizes import format_size

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient

_POLL_S = 0.5
_MOST_COUNTS = 20
_COUNTS = re.compile(r"segment \d+: \d+ blocks are counted as live, .*")


class DevicesCommand(click.Command):
    """Lets --fast and --base take several devices each: `NAME --fast A B --base C`.

    Only behind the name, so that a name that comes last is not taken for a device.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-"):
            args = _one_option_each(args)
        return super().parse_args(ctx, args)


def _one_option_each(args: Sequence[str]) -> list[str]:
    """`--fast A B` as `--fast A --fast B`."""
    spread: list[str] = []
    option, given = "", 0
    for arg in args:
        if arg.startswith("-"):
            option, given = (arg, 0) if arg in ("--fast", "--base") else ("", 0)
        elif option:
            if given:
                spread.append(option)
            given += 1
        spread.append(arg)
    return spread


def device_options(command: Any) -> Any:
    for tier, about in (("base", "Devices for cold data."), ("fast", "Devices for the log and hot data.")):
        command = click.option(f"--{tier}", type=DEVICE, multiple=True, metavar="DEV...", help=about)(command)
    force = "Use devices that carry a filesystem, a partition table or another pool: THEIR DATA IS LOST."
    return click.option("--force", is_flag=True, help=force)(command)


def _devices(fast: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if not fast and not base:
        raise click.UsageError("name at least one device with --fast or --base")
    return [{**device, "tier": tier} for tier, given in (("fast", fast), ("base", base)) for device in given]


@click.group()
def pool() -> None:
    """Pools: sets of devices that volumes live on."""


@pool.command(cls=DevicesCommand)
@click.argument("name")
@device_options
@output_option
@pass_context
def create(
    context: Context, name: str, fast: list[dict[str, Any]], base: list[dict[str, Any]], force: bool, output: str
) -> None:
    """Create a pool.

    DEV is a block device, a file, or PATH=SIZE, which makes a sparse file.
    """
    body = {"name": name, "devices": _devices(fast, base), "force": force}
    with context.connect() as client, patience(f"Creating pool {name}"):
        made = client.request("POST", "pools", body=body)
    if output == "json":
        show_json(made)
    else:
        space = format_size(made["available_bytes"])
        click.echo(f"Pool {name} has {space} for data on {len(made['devices'])} device(s).")


@pool.command("list")
@output_option
@pass_context
def list_pools(context: Context, output: str) -> None:
    """List all pools, those that can't be opened too."""
    with context.connect() as client:
        pools = client.get("pools")
    if output == "json":
        show_json(pools)
    else:
        show_pools(pools)


def show_pools(pools: Sequence[dict[str, Any]], title: str = "") -> None:
    """The table of pools, and below it why some are not open."""
    rows: list[tuple[object, ...]] = []
    for found in pools:
        if "capacity_bytes" not in found:
            rows.append((found["name"], found["state"], *7 * ("-",)))
            continue
        rows.append(
            (
                found["name"],
                found["state"],
                len(found["volumes"]),
                format_size(found["nominal_bytes"]),
                format_size(found["used_bytes"]),
                format_size(found["available_bytes"]),
                format_size(found["capacity_bytes"]),
                percent(found["used_bytes"], found["capacity_bytes"]),
                brief(found["scrub"]),
            )
        )
    columns = ("Pool", "State", ">Volumes", ">Nominal", ">Used", ">Available", ">Capacity", ">Use", "Scrub")
    empty = "There are no pools; terrace pool create makes one."
    show_table(columns, rows, title=title, empty=empty, spare=(">Nominal", ">Volumes"))
    for found in pools:
        if found.get("error"):
            click.echo(f"{found['name']}: {found['error']}")


@pool.command()
@click.argument("name", type=POOL)
@output_option
@pass_context
def show(context: Context, name: str, output: str) -> None:
    """Show one pool: its space, its log, its devices and its volumes."""
    with context.connect() as client:
        found = client.get("pools", name)
    if output == "json":
        show_json(found)
    else:
        show_pool(found)


def show_pool(found: dict[str, Any]) -> None:
    """Everything about one pool."""
    if "capacity_bytes" not in found:
        facts = [("Pool", found["name"]), ("State", found["state"]), ("Error", found["error"] or "")]
        show_facts([*facts, ("Next step", f"mend what the error names, then: terrace pool open {found['name']}")])
        return
    size = {key: format_size(value) for key, value in found.items() if key.endswith("_bytes")}
    client, device = found["client_written_bytes"], found["device_written_bytes"]
    volume_count = len(found["volumes"])
    snapshot_count = sum(volume["snapshots"] for volume in found["volumes"])
    show_facts(
        [
            ("Pool", found["name"]),
            ("State", found["state"]),
            *(("Problem", found[key]) for key in ("problem", "checkpoint_failure") if found[key]),
            ("UUID", found["uuid"]),
            ("Block size", format_size(found["block_size"])),
            (
                "Data space",
                f"{size['used_bytes']} used of {size['capacity_bytes']} "
                f"({percent(found['used_bytes'], found['capacity_bytes'])}), {size['available_bytes']} available",
            ),
            ("Metadata space", f"{size['metadata_bytes']} used of {size['metadata_total_bytes']} in segments for it"),
            ("Minimum free", f"{size['reserve_bytes']} kept for deletes, trims and cleaning"),
            (
                "Deferred frees",
                f"{size['pending_free_bytes']} free after the next checkpoint"
                + (", and what was trimmed or deleted lately, not counted yet" if found["uncounted_frees"] else ""),
            ),
            (
                "Volumes",
                f"{volume_count}, {size['nominal_bytes']} nominal, "
                f"{found['nominal_bytes'] / max(found['capacity_bytes'], 1):.2f} x the capacity"
                + (f" (limit {found['overcommit_limit']:g} x)" if found["overcommit_limit"] else ""),
            ),
            *([("Snapshots", f"{snapshot_count}: terrace snapshot list {found['name']}")] if snapshot_count else []),
            (
                "Log",
                f"sequence {found['log_seq']}, durable to {found['durable_seq']}, "
                f"checkpoint at {found['checkpoint_seq']} ({found['checkpoints']} since start)",
            ),
            (
                "Written",
                f"{size['client_written_bytes']} by clients, {size['device_written_bytes']} to devices"
                + (f" ({device / client:.2f} x)" if client else ""),
            ),
            ("Cleaning", f"{found['blocks_moved']} blocks moved"),
            *(
                [("Hit ratio", f"{100 * found['hit_ratio']:.1f} % of reads lately were of the fast tier")]
                if found["hit_ratio"] is not None
                else []
            ),
            *(("Evacuation", brief_evacuation(one)) for one in found["evacuations"]),
            *(
                [("Lost", f"{size['lost_bytes']} of volumes: terrace pool evacuate {found['name']} --status")]
                if found["lost_bytes"]
                else []
            ),
            *scrub_facts(found["scrub"]),
        ]
    )
    click.echo()
    _show_devices(found["devices"])
    click.echo()
    show_volumes(found["volumes"], empty=f"No volumes yet; terrace volume create {found['name']}/VOL SIZE makes one.")


def _show_devices(devices: Sequence[dict[str, Any]]) -> None:
    """Each device, and what its space is used for; sums for a tier of several. Two tables, to fit 80 columns."""
    rows: list[tuple[object, ...]] = []
    space: list[tuple[object, ...]] = []
    for tier in ("fast", "base"):
        ones = [device for device in devices if device["tier"] == tier]
        for one in ones:
            sizes = format_size(one["size_bytes"]), format_size(one["segment_bytes"])
            free = f"{one['free_segments']} of {one['segments']}"
            rows.append((tier, one["state"], *sizes, free, one["errors"], one["path"]))
        if len(ones) > 1:
            keys = ("used_bytes", "live_bytes", "logical_bytes", "written_bytes")
            space.append((tier, *_space({key: sum(one[key] for one in ones) for key in keys}), f"{len(ones)} devices"))
        space += [(tier, *_space(one), one["path"]) for one in ones]
    show_table(("Tier", "State", ">Size", ">Segment", ">Free segments", ">Errors", "Device"), rows)
    click.echo()
    show_table(("Tier", ">Used", ">Live", ">Dead", ">Packed", ">Written", "Device"), space)


def _space(device: dict[str, Any]) -> tuple[object, ...]:
    """What segments in use take, what of it is live and what isn't, how well that is packed, what was written."""
    used, live, logical = device["used_bytes"], device["live_bytes"], device["logical_bytes"]
    return (
        format_size(used),
        format_size(live),
        format_size(max(0, used - live)),
        f"{logical / live:.2f} x" if live and logical > live else "-",
        format_size(device["written_bytes"]),
    )


def show_volumes(volumes: Sequence[dict[str, Any]], empty: str) -> None:
    """The table of volumes."""
    clones = any(volume["origin"] for volume in volumes)
    unfilled = any(volume["filling"] for volume in volumes)
    mirrored = any(volume.get("mirror") for volume in volumes)
    rows = [
        (
            volume["name"],
            *([shown_state(volume) or "-"] if unfilled else []),
            format_size(volume["size_bytes"]),
            *shown_mapped(volume),
            volume["open_count"] or "-",
            volume["snapshots"] or "-",
            shown_policy(volume),
            *([volume["origin"] or "-"] if clones else []),
            *([brief_mirror(volume["mirror"])] if mirrored else []),
        )
        for volume in volumes
    ]
    state = ["State"] * unfilled
    last = [*(["Origin"] * clones), *(["Mirror"] * mirrored)]
    columns = ("Volume", *state, ">Size", ">Mapped", ">Use", ">Clients", ">Snapshots", "Policy", *last)
    show_table(columns, rows, empty=empty, spare=(">Use", ">Clients"))


def shown_mapped(volume: dict[str, Any]) -> tuple[str, str]:
    """What a volume shows, of a clone, and so after a rollback, most of it not its own; and the share of its size.

    What has no leg here is what the node of a leg has told lately, if anything.
    """
    mirror, mapped_bytes = volume.get("mirror"), volume["referenced_bytes"]
    if mirror and mirror["diskless"] and not mapped_bytes:
        return "-", "-"
    return format_size(mapped_bytes), percent(mapped_bytes, volume["size_bytes"])


def shown_state(volume: dict[str, Any], *, remedy: bool = False) -> str:
    """How far a volume is that something has begun to fill; empty for one that is complete."""
    if not volume["filling"]:
        return ""
    if volume["open_count"]:
        return "being filled" + ", so not complete yet" * remedy
    if not remedy:
        return "incomplete"
    name = volume["name"]
    back = f"roll it back to one of its snapshots (terrace snapshot list {name}), or " if volume["snapshots"] else ""
    return (
        f"incomplete, and no client is there that fills it: {back}delete it (terrace volume delete {name}) and import "
        f"or restore again; if you know that all of it is there: terrace volume complete {name}"
    )


def shown_policy(volume: dict[str, Any], *, remedy: bool = False) -> str:
    """The policy of a volume, and whether that is one."""
    if not volume["policy_missing"]:
        return str(volume["policy"])
    what = "not defined, so the default holds"
    return (
        f"{volume['policy']} ({what}: terrace policy list shows those that are)"
        if remedy
        else (f"{volume['policy']} ({what})")
    )


@pool.command(cls=DevicesCommand)
@click.argument("name", type=POOL)
@device_options
@output_option
@pass_context
def grow(
    context: Context, name: str, fast: list[dict[str, Any]], base: list[dict[str, Any]], force: bool, output: str
) -> None:
    """Add devices to a pool."""
    body = {"devices": _devices(fast, base), "force": force}
    with context.connect() as client, patience(f"Growing pool {name}"):
        grown = client.request("POST", "pools", name, "grow", body=body)
    if output == "json":
        show_json(grown)
    else:
        click.echo(f"Pool {name} now has {format_size(grown['capacity_bytes'])} on {len(grown['devices'])} device(s).")


pool.add_command(evacuate)


@pool.command("open")
@click.argument("name", type=POOL)
@output_option
@pass_context
def open_pool(context: Context, name: str, output: str) -> None:
    """Try again to open a pool that failed."""
    with context.connect() as client, patience(f"Opening pool {name}"):
        found = client.request("POST", "pools", name, "open")
    if output == "json":
        show_json(found)
    else:
        click.echo(f"Pool {name} is {found['state']}.")


@pool.command()
@click.argument("name", type=POOL)
@click.option("--full", is_flag=True, help="Read and verify all data, not a sample.")
@click.option("--truncate-log", is_flag=True, help="Where the log is damaged: what lies behind IS LOST.")
@click.option("--give-up-map", is_flag=True, help="Where pages of maps are damaged: what lies below IS LOST.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask before something is given up.")
@click.option("--rebuild-catalog", is_flag=True, help="Where the catalog is lost: make it anew from the devices.")
@click.option(
    "--device", "devices", type=click.Path(path_type=Path), multiple=True, metavar="DEV", help="A device of the pool."
)
@click.option("--force", is_flag=True, help="Rebuild a catalog that is sound too; the old one is kept.")
@output_option
@pass_context
def check(
    context: Context,
    name: str,
    full: bool,
    truncate_log: bool,
    give_up_map: bool,
    yes: bool,
    rebuild_catalog: bool,
    devices: tuple[Path, ...],
    force: bool,
    output: str,
) -> int:
    """Verify a pool: the map against the segments, live counts, checksums.

    Goes through the daemon where one runs; otherwise opens the pool itself for as long as it takes.

    With --rebuild-catalog makes the pool's catalog anew from its devices first: for a pool whose catalog is lost, or
    that comes from another host. No daemon may have the pool open.

    With --give-up-map opens the pool anew, and gives up damaged pages of maps with all that lies below them: for a pool
    that takes no writes since one of its maps is damaged. A first check, without it, tells which these are.
    """
    from terrace.apiclient import NotRunningError

    if (devices or force) and not rebuild_catalog:
        raise click.UsageError("--device and --force go with --rebuild-catalog")
    if truncate_log:
        confirm(f"Give up what the log of pool {name} holds behind its damage, for good?", yes=yes)
    if give_up_map:
        if rebuild_catalog:
            raise click.UsageError("--give-up-map goes after --rebuild-catalog: check the pool again, with that alone")
        confirm(f"Give up what lies below damaged pages of the maps in pool {name}, for good?", yes=yes)
    report: dict[str, Any] = {}
    given_up: dict[str, Any] = {}
    if rebuild_catalog:
        from terrace.cli.offline import rebuild_offline

        with patience(f"Rebuilding and checking pool {name}") as advance:
            report = rebuild_offline(
                context.home, name, devices, force=force, full=full, truncate_log=truncate_log, advance=advance
            )
        return _show_report(name, report, output)
    with patience(f"Checking pool {name}") as advance:
        try:
            with context.connect() as client:
                if truncate_log or give_up_map:
                    body = {"truncate_log": truncate_log, "give_up_map": give_up_map}
                    opened = client.request("POST", "pools", name, "open", body=body)
                    given_up = {"given_up": opened.get("given_up")}
                for line in client.stream("POST", "pools", name, "check", body={"full": full}):
                    if "report" in line:
                        report = line["report"] | given_up
                    elif line["total_bytes"]:  # as long as it isn't known the map is being walked
                        advance(line["done_bytes"], line["total_bytes"])
        except NotRunningError:
            from terrace.cli.offline import check_offline

            report = check_offline(
                context.home, name, full=full, truncate_log=truncate_log, give_up_map=give_up_map, advance=advance
            )
    return _show_report(name, report, output)


def _show_report(name: str, report: dict[str, Any], output: str) -> int:
    """What a check found; the exit status."""
    if output == "json":
        show_json(report)
    else:
        if rebuilt := report.get("rebuilt"):
            click.echo(
                f"The catalog of pool {name} is rebuilt from its {len(rebuilt['devices'])} device(s), checkpoint "
                f"{rebuilt['checkpoint_seq']} and the log after it."
            )
            if rebuilt["kept_as"]:
                click.echo(f"The old one is kept as {rebuilt['kept_as']}.")
            click.echo(f"Where terraced runs: terrace pool open {name}")
        found = f"{report['volumes']} volume(s), {report['blocks_mapped']} blocks mapped"
        found += f", {format_size(report['bytes_checked'])} of data verified"
        if "given_up" in report:
            click.echo(f"Pool {name}: {report['given_up'] or 'its log is whole, nothing was given up'}.")
        for problem in _shortened(report["problems"]):
            click.echo(problem)
        verdict = "is sound" if report["ok"] else f"has {len(report['problems'])} problem(s)"
        click.echo(f"Pool {name} {verdict}: {found}.")
    return 0 if report["ok"] else 1


def _shortened(problems: list[str]) -> list[str]:
    """With few of those lines that follow from others, one for each segment: there may be thousands."""
    shown, counts = [], 0
    for problem in problems:
        if _COUNTS.fullmatch(problem):
            counts += 1
            if counts > _MOST_COUNTS:
                continue
        shown.append(problem)
    if counts > _MOST_COUNTS:
        shown.append(f"and {counts - _MOST_COUNTS} more segments whose blocks are miscounted; -o json has them.")
    return shown


@pool.command()
@click.argument("name", type=POOL)
@click.option("--wait", is_flag=True, help="Stay until it ends, and show how far it is.")
@click.option("--rate", type=SIZE, help="Read at most so many bytes a second, over all devices; 0: no limit.")
@click.option("--status", is_flag=True, help="Only show the newest scrub and what it found.")
@click.option("--pause", is_flag=True, help="Halt it; starting it again goes on from there.")
@click.option("--stop", is_flag=True, help="End it for good.")
@output_option
@pass_context
def scrub(
    context: Context, name: str, wait: bool, rate: int | None, status: bool, pause: bool, stop: bool, output: str
) -> int:
    """Read all live data and verify it: start, resume, follow or halt a scrub.

    The daemon does it in the background and goes on after a restart. With --wait and --status the exit status is 1 if
    errors are known, or blocks that are lost.
    """
    if status + pause + stop > 1 or ((wait or rate is not None) and (pause or stop)) or (rate is not None and status):
        raise click.UsageError("--status, --pause and --stop stand alone; --wait and --rate are for starting a scrub")
    with context.connect() as client:
        if status:
            found = client.get("pools", name, "scrub")
        else:
            before = client.get("pools", name, "scrub")["state"]
            action = "pause" if pause else "stop" if stop else "start"
            body = {"action": action} if rate is None else {"action": action, "rate": rate}
            found = client.request("POST", "pools", name, "scrub", body=body)
        if wait:
            try:
                found = _follow(client, name, found)
            except KeyboardInterrupt:
                raise click.ClickException(
                    f"no longer watching; the scrub goes on: terrace pool scrub {name} --pause halts it"
                ) from None
    if output == "json":
        show_json(found)
    elif status or (wait and found["errors"]):
        show_scrub(name, found)
    elif wait or pause or stop:
        click.echo(verdict(name, found))
    else:
        limit = f", now at {format_size(rate)}/s at most" if rate else ", now without a limit" if rate == 0 else ""
        told = {
            "running": f"runs already{limit}",
            "finished": "is started",
            "never": "is started",
            "stopped": "is started",
        }
        click.echo(
            f"The scrub of pool {name} {told.get(before, 'goes on')}; terrace pool scrub {name} --status follows it."
        )
    if wait:
        return 0 if found["state"] == "finished" and is_well(found) else 1
    return 0 if not status or is_well(found) else 1


def _follow(client: ApiClient, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Show how far a scrub is until it ends or is halted; what is known of it then."""
    with patience(f"Scrubbing pool {name}") as advance:
        while found["state"] == "running":
            advance(found["done_bytes"], found["total_bytes"])
            time.sleep(_POLL_S)
            found = client.get("pools", name, "scrub")
    return found


@pool.command()
@click.argument("name", type=POOL)
@click.option("--force", is_flag=True, help="If it takes no writes, or can't be opened: with legs of mirrors, too.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_option
@pass_context
def delete(context: Context, name: str, force: bool, yes: bool, output: str) -> None:
    """Delete a pool and all its volumes. Its device files stay, without their labels."""
    with context.connect() as client:
        found = client.get("pools", name)
        volumes = found.get("volumes", [])
        is_unknown = found["state"] == "failed"
        legs = []
        if force and is_unknown:
            click.echo(
                f"Pool {name} can't be opened ({found['error']}): what is in it isn't known. Whatever it is goes "
                "with it, legs of mirrors and held snapshots too.",
                err=True,
            )
        elif force:
            legs = _lost_legs(client, name, volumes)
            for line in legs:
                click.echo(line, err=True)
        snapshots = sum(volume["snapshots"] for volume in volumes)
        losses = f" and its {count(len(volumes), 'volume')}" if volumes else ""
        losses += f" with {count(snapshots, 'snapshot')}" if snapshots else ""
        confirm(f"Delete pool {name}{losses} for good?", yes=yes)
        with patience(f"Deleting pool {name}"):
            client.request("DELETE", "pools", name, query={"force": "1"} if force else None)
    if output == "json":
        show_json({"deleted": name, **({"legs": None if is_unknown else legs} if force else {})})
    else:
        click.echo(f"Pool {name} is deleted.")
        if legs or is_unknown:
            lost = "Of each mirror that lost its leg here" + (", if there is one" if is_unknown else "")
            click.echo(
                f"{lost}, at the primary (if that was here, promote another node first): "
                "`terrace volume mirror remove POOL/VOL NODE`, and `add` when there is a pool here again."
            )


def _lost_legs(client: ApiClient, pool_name: str, volumes: list[dict[str, Any]]) -> list[str]:
    """A sentence for each of these that is a leg of a mirror."""
    legs = []
    for one in volumes:
        if one.get("mirror") is not None:
            legs.append(_lost_leg(client.get("pools", pool_name, "volumes", one["name"].partition("/")[2], "mirror")))
        elif one.get("mirror_problem") is not None:
            legs.append(
                f"{one['name']}: it is a leg of a mirror that can't be used, and goes with the pool; WHETHER ANOTHER "
                "ONE IS UP TO DATE ISN'T KNOWN."
            )
    return legs


def _lost_leg(mirror: dict[str, Any]) -> str:
    """What a mirror is without its leg here, as far as that is known."""
    others = [leg for leg in mirror["legs"] if leg["kind"] == "terrace" and leg["node"] != mirror["node"]]
    good = [leg["node"] for leg in others if leg["state"] == "UpToDate"]
    known = "" if mirror["state"] != "Unknown" else ", by what was known here last"
    goes = f"{mirror['volume']}: its leg here goes with the pool"
    if good:
        return f"{goes}; another one is up to date on node {', '.join(good)}{known}."
    return f"{goes}, AND NO OTHER ONE IS KNOWN TO BE UP TO DATE{known}."
