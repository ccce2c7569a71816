"""`terrace volume mirror`: the copies of a volume on several nodes, and which node serves it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from terrace.apiclient import ApiClient, ApiError
from terrace.cli.context import VOLUME, Context, confirm, pass_context
from terrace.cli.node import LEG, LEG_PLACE, NODE
from terrace.cli.output import duration, output_option, patience, say, show_facts, show_json, show_table
from terrace.sizes import format_size

NONE = "There are no mirrors; terrace volume create POOL/VOL SIZE --mirror NODE makes one."
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 0.3
_MOST_RANGES = 50
"""People get so many of what a verify found."""
_UNTIL = ("UpToDate",)


@click.group()
def mirror() -> None:
    """Mirrors: volumes with a copy, a leg, on each of several nodes. One node, the primary, serves it."""


def _mirror_argument(command: Any) -> Any:
    return click.argument("volume", type=VOLUME, metavar="POOL/VOL")(command)


def _path(volume: tuple[str, str], *rest: str) -> tuple[str, ...]:
    return ("pools", volume[0], "volumes", volume[1], "mirror", *rest)


@mirror.command("list")
@output_option
@pass_context
def list_mirrors(context: Context, output: str) -> None:
    """List the mirrors that this node has a leg of, or serves without one, with a line for each leg."""
    with context.connect() as client:
        found = client.get("mirrors")
        votes = client.get("tiebreakers") if output != "json" else []
    if output == "json":
        show_json(found)
        return
    if found or not votes:
        show_mirrors(found)
    show_votes(votes, spaced=bool(found))


def show_votes(votes: list[dict[str, Any]], *, spaced: bool = False) -> None:
    """A sentence for each mirror that this node is but a tie-breaker of. `spaced`: something is shown above."""
    for index, vote in enumerate(votes):
        if spaced or index:
            click.echo()
        legs = ", ".join(f"{leg['export']} on node {leg['node']}" for leg in vote["legs"])
        where = vote["primary"] or "one of these"
        say(f"This node is a tie-breaker of the mirror of {legs}: `terrace volume mirror show` on {where} tells more.")


def show_mirrors(found: list[dict[str, Any]]) -> None:
    """A table with a line for each leg."""
    rows = []
    for one in found:
        for index, leg in enumerate(one["legs"]):
            rows.append(
                (
                    one["volume"] if index == 0 else "",
                    shown_node(one, leg),
                    leg["pool"],
                    leg["state"],
                    format_size(one["size_bytes"]) if index == 0 else "",
                    "-" if leg["to_sync_bytes"] is None else format_size(leg["to_sync_bytes"]),
                    "-" if leg["eta_s"] is None else duration(leg["eta_s"]),
                )
            )
        if one["primary"] and one["legs"] and all(leg["node"] != one["primary"] for leg in one["legs"]):
            rows.append(("", f"{one['primary']} (primary)", "-", "Diskless", "", "-", "-"))
        if not one["legs"]:
            rows.append((one["volume"], "-", "-", one["state"], format_size(one["size_bytes"]), "-", "-"))
    show_table(
        ("Mirror", "Node", "Pool", "State", ">Size", ">To sync", ">ETA"),
        rows,
        empty=NONE,
        spare=("Pool", ">ETA", ">Size"),
    )
    for one in found:
        waiting = one["waiting"] and f"writes {_wait(one)}: {one['waiting']}"
        for sentence in filter(None, (one["problem"], waiting, unreadable(one), *_why_out(one))):
            click.echo()
            say(f"{one['volume']}: {sentence}")


def unreadable(one: dict[str, Any]) -> str | None:
    """That blocks can be read on no leg, however well all else is, and which command names them; None for none."""
    count = one.get("unreadable_blocks")  # a daemon of an older release doesn't say it
    blocks = f"{count} blocks" if count != 1 else "one block"
    return f"no leg in sync can read {blocks}: see `terrace volume mirror explain {one['volume']}`" if count else None


def _wait(one: dict[str, Any]) -> str:
    """What writes do that can't be done now."""
    return "fail" if one.get("writes_fail") else "wait"  # a daemon of an older release doesn't say it


def _why_out(one: dict[str, Any]) -> list[str]:
    """A sentence for each leg that is out, with the reason that it gave."""
    return [
        f"{place_of(leg)}: {leg['error']}"
        for leg in one["legs"]
        if leg["error"] and not (one["problem"] and place_of(leg) == one["node"])  # which says the same
    ]


def shown_node(one: dict[str, Any], leg: dict[str, Any]) -> str:
    """The leg's node, and whether it is the primary; an NBD server's URI."""
    return f"{leg['node']} (primary)" if place_of(leg) == one["primary"] else place_of(leg)


def place_of(leg: dict[str, Any]) -> str:
    """What people call a leg by."""
    return str(leg["export"] if leg["kind"] == "nbd" else leg["node"])


@mirror.command()
@_mirror_argument
@output_option
@pass_context
def show(context: Context, volume: tuple[str, str], output: str) -> None:
    """Show a mirror and all its legs."""
    with context.connect() as client:
        found = client.get(*_path(volume))
    _show(found, output)


def _show(found: dict[str, Any], output: str) -> None:
    if output == "json":
        show_json(found)
        return
    show_facts(
        [
            ("Mirror", found["volume"]),
            ("State", found["state"]),
            ("Primary", found["primary"] or "none"),
            ("Here", f"{found['node']}, {found['role']}" + (", without a leg" if found["diskless"] else "")),
            ("Size", format_size(found["size_bytes"])),
            *([("Voters", ", ".join(found["voters"]))] if len(found["voters"]) > 2 else []),
            *_shown_arbiter(found["arbiter"]),
            ("Term", f"{found['term']}.{found['epoch']}"),
            *([("Next primary", found["token"])] if found["token"] else []),
            *([(f"Writes {_wait(found)}", found["waiting"])] if found["waiting"] else []),
            *([("Problem", found["problem"])] if found["problem"] else []),
            *([("Damage", damage)] if (damage := unreadable(found)) else []),
            ("Id", found["mirror"]),
        ]
    )
    click.echo()
    rows = [
        (
            shown_node(found, leg),
            "-" if leg["kind"] == "nbd" else leg["export"],
            leg["state"],
            "-" if leg["for_s"] is None else duration(leg["for_s"]),
            "-" if leg["to_sync_bytes"] is None else format_size(leg["to_sync_bytes"]),
            "-" if leg["eta_s"] is None else duration(leg["eta_s"]),
            format_size(leg["queued_bytes"]),
            leg["healed_blocks"],
            _snapshots(leg),
        )
        for leg in found["legs"]
    ]
    columns = ("Node", "Volume", "State", ">For", ">To sync", ">ETA", ">Queued", ">Healed", ">Snapshots")
    show_table(columns, rows, spare=(">Queued", ">Healed", ">ETA", "Volume", ">Snapshots"))
    for sentence in _why_out(found):
        click.echo()
        say(sentence)
    for leg in found["legs"]:
        if leg.get("map_damage"):
            click.echo()
            say(f"{place_of(leg)}: {leg['map_damage']}.")


def _snapshots(leg: dict[str, Any]) -> str:
    """`12`, or `10 of 12` where others have some that this leg lacks."""
    have, lacks = leg.get("snapshots"), leg.get("lacking_snapshots")
    if have is None:
        return "-"
    return f"{have} of {have + lacks}" if lacks else str(have)


def _shown_arbiter(arbiter: dict[str, Any] | None) -> list[tuple[str, str]]:
    if arbiter is None or arbiter["kind"] == "legs":
        return []
    return [("Arbiter", f"{arbiter['kind']}, " + ("answers" if arbiter["answers"] else str(arbiter["problem"])))]


@mirror.command()
@_mirror_argument
@output_option
@pass_context
def explain(context: Context, volume: tuple[str, str], output: str) -> None:
    """Say in sentences how a mirror is, what it waits for, and what can be done."""
    with context.connect() as client:
        found = client.get(*_path(volume, "explain"))
    if output == "json":
        show_json(found)
    else:
        say(found["text"])


@mirror.command()
@_mirror_argument
@click.argument("place", type=LEG_PLACE, metavar="NODE[/POOL]|URI")
@click.option("--wait", is_flag=True, help="Until the new leg is up to date.")
@click.option("--voter", is_flag=True, help="No leg: NODE is a tie-breaker, with a say about who is primary.")
@click.option(
    "--arbiter",
    type=click.Choice(["legs", "etcd"]),
    help="Of a volume that isn't mirrored yet: who decides which node may serve it.",
)
@output_option
@pass_context
def add(
    context: Context,
    volume: tuple[str, str],
    place: tuple[str, str | None],
    wait: bool,
    voter: bool,
    arbiter: str | None,
    output: str,
) -> None:
    """Give a volume one more leg, on NODE. One that isn't mirrored yet must have no clients for that moment.

    A URI such as nbd://host/export is a leg on any NBD server, which gets a copy of all data and decides nothing.
    """
    node, pool = place
    if voter and arbiter is not None:
        raise click.UsageError(
            "--voter and --arbiter don't go together: a tie-breaker is added to a mirror that exists"
        )
    with context.connect() as client:
        with patience(f"Adding a leg on {node}"):
            body = {"node": node, "pool": pool, "voter": voter} | ({"arbiter": arbiter} if arbiter else {})
            found = client.request("POST", *_path(volume, "legs"), body=body)
        if wait and not voter:
            found = _follow(client, volume, node)
    if output == "json":
        show_json(found)
    elif voter:
        click.echo(f"{found['volume']} has the voters {', '.join(found['voters'])}.")
    else:
        leg = _leg(found, node)
        there = "" if leg["kind"] == "nbd" else f"{leg['export']}, "
        click.echo(f"{found['volume']} has a leg on {node}, {there}{_how_a_new_leg_is(found['volume'], leg)}.")


def _how_a_new_leg_is(name: str, leg: dict[str, Any]) -> str:
    if leg["state"] not in ("Stale", "Syncing"):
        return f"which is {leg['state']}"
    return f"which is being filled ({leg['state']}); `terrace volume mirror show {name}` tells how far it is"


def _may_have_leg(client: ApiClient, volume: tuple[str, str], node: str) -> bool:
    """Whether something could be lost by its removal; a wrong name is answered without a question."""
    try:
        return any(leg["node"] == node for leg in client.get(*_path(volume))["legs"])
    except ApiError:
        return True


@mirror.command()
@_mirror_argument
@click.argument("node", type=LEG, metavar="NODE|URI")
@click.option("--force", is_flag=True, help="Even if it has snapshots that no leg here has: these ARE LOST.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_option
@pass_context
def remove(context: Context, volume: tuple[str, str], node: str, force: bool, yes: bool, output: str) -> None:
    """Take the leg on NODE out of a mirror, and delete its volume there. A node that is offline is left as it is.

    Of an NBD server's leg, by its URI, the data stay where they are.
    """
    with context.connect() as client:
        if "://" not in node and _may_have_leg(client, volume, node):
            confirm(f"Delete the copy of {volume[0]}/{volume[1]} on node {node} for good?", yes=yes)
        query = {"force": "1"} if force else None
        with patience(f"Removing the leg on {node}"):
            done = client.request("DELETE", *_path(volume, "legs", node), query=query)
    if output == "json":
        show_json(done)
        return
    name = f"{volume[0]}/{volume[1]}"
    if done.get("voter"):
        click.echo(f"Node {node} is no voter of {name} any more.")
    elif not done["removed"] and done["left"]:
        click.echo(f"{name} {'has no leg on ' + node if done['mirrored'] else 'is not mirrored'}.")
    elif not done["removed"]:
        click.echo(f"{name} {'has no leg on ' + node if done['mirrored'] else 'is not mirrored'}: nothing was removed.")
    else:
        click.echo(f"{name} has no leg on {node} any more" + ("." if done["mirrored"] else ", and is a plain volume."))
    for sentence in done["left"]:
        click.echo(f"Left: {sentence}")


@mirror.command()
@_mirror_argument
@click.option("--force", is_flag=True, help="Without proof that nothing is lost; what may be is said before.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@click.option("--from", "source", type=NODE, metavar="NODE", help="This node has no leg: NODE has one, as POOL/VOL.")
@click.option("--as", "own", type=VOLUME, metavar="POOL/VOL", help="With --from: what it is called here.")
@output_option
@pass_context
def promote(
    context: Context,
    volume: tuple[str, str],
    force: bool,
    yes: bool,
    source: str | None,
    own: tuple[str, str] | None,
    output: str,
) -> None:
    """Let this node be the primary, and serve the volume.

    It has to be proven that no other node serves it and that no acknowledged write is missing here; else it is refused
    with the nodes that have to be heard. A node without a leg, and without any pool, can be it too: with --from.
    """
    name = f"{volume[0]}/{volume[1]}"
    if own is not None and source is None:
        raise click.UsageError("--as is for a node that has no leg of the mirror: say --from NODE, too")
    with context.connect() as client:
        if force and source is None:
            loss = client.request("POST", *_path(volume, "promote"), body={"dry_run": True})["may_lose"]
            if loss:
                click.echo(loss, err=True)
                confirm(f"Promote {name} by force?", yes=yes)
        body: dict[str, Any] = {"force": force}
        if source is not None:
            body |= {"from": source} | ({"name": f"{own[0]}/{own[1]}"} if own is not None else {})
        with patience(f"Promoting {name}"):
            found = client.request("POST", *_path(volume, "promote"), body=body)
    if output == "json":
        show_json(found)
    else:
        click.echo(f"Node {found['node']} is the primary of {found['volume']}, term {found['term']}: {found['state']}.")


@mirror.command()
@_mirror_argument
@click.option("--to", type=NODE, metavar="NODE", help="Let that one be the primary.")
@click.option("--force", is_flag=True, help="Though clients are connected, which are cut off then.")
@output_option
@pass_context
def demote(context: Context, volume: tuple[str, str], to: str | None, force: bool, output: str) -> None:
    """Let this node not be the primary any more. Without --to nobody serves the volume until one is promoted."""
    name = f"{volume[0]}/{volume[1]}"
    with context.connect() as client, patience(f"Demoting {name}"):
        found = client.request("POST", *_path(volume, "demote"), body={"to": to, "force": force})
    if output == "json":
        show_json(found)
    elif to is not None:
        click.echo(f"Node {to} is the primary of {name} now.")
    else:
        holder = f"; {found['token']} may become it without asking the others" if found["token"] else ""
        click.echo(f"{name} has no primary now{holder}.")


@mirror.command()
@_mirror_argument
@click.option("--force", is_flag=True, help="Even while this node is the primary: clients are cut off.")
@output_option
@pass_context
def forget(context: Context, volume: tuple[str, str], force: bool, output: str) -> None:
    """Let this node have nothing to do any more with a mirror that it has no leg of. No leg is changed by that."""
    name = f"{volume[0]}/{volume[1]}"
    with context.connect() as client:
        done = client.request("POST", *_path(volume, "forget"), body={"force": force})
    if output == "json":
        show_json(done)
    else:
        click.echo(f"This node takes no part in {name} any more.")


@mirror.command()
@_mirror_argument
@click.argument("node", type=LEG, metavar="NODE|URI")
@click.option("--discard", is_flag=True, help="In a split brain: what was written on NODE and not here IS LOST.")
@click.option("--full", is_flag=True, help="Compare all of it, not only what is known to differ.")
@click.option("--no-wait", is_flag=True, help="Don't wait until it is up to date.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_option
@pass_context
def resync(
    context: Context,
    volume: tuple[str, str],
    node: str,
    discard: bool,
    full: bool,
    no_wait: bool,
    yes: bool,
    output: str,
) -> None:
    """Bring the leg on NODE up to date, and show how far that is. It happens by itself as soon as NODE is there."""
    name = f"{volume[0]}/{volume[1]}"
    if discard:
        confirm(f"Give up what was written to {name} on node {node} and not here?", yes=yes)
    with context.connect() as client:
        body = {"node": node, "discard": discard, "full": full}
        found = client.request("POST", *_path(volume, "resync"), body=body)
        if not no_wait:
            found = _follow(client, volume, node)
    if output == "json":
        show_json(found)
    else:
        leg = _leg(found, node)
        left = f", {format_size(leg['to_sync_bytes'])} to go" if leg["to_sync_bytes"] else ""
        where = node if leg["kind"] == "nbd" else f"node {node}"
        click.echo(f"The leg of {name} on {where} is {leg['state']}{left}.")


@mirror.command()
@_mirror_argument
@click.option("--full", is_flag=True, help="Read all data on every leg; else only checksums are compared.")
@click.option("--repair", is_flag=True, help="Write what the primary's leg has where another one differs.")
@output_option
@pass_context
def verify(context: Context, volume: tuple[str, str], full: bool, repair: bool, output: str) -> None:
    """Compare the legs in sync while clients go on. Exit status 1 if they differ and aren't repaired."""
    name = f"{volume[0]}/{volume[1]}"
    report: dict[str, Any] = {}
    with context.connect() as client, patience(f"Verifying {name}") as advance:
        for line in client.stream("POST", *_path(volume, "verify"), body={"full": full, "repair": repair}):
            if "report" in line:
                report = line["report"]
            elif line["total_bytes"]:
                advance(line["done_bytes"], line["total_bytes"])
    if output == "json":
        show_json(report)
    else:
        rows = [
            row
            for what, key in (("differs", "differing"), ("unreadable", "unreadable"), ("map damaged", "map_damaged"))
            for row in _joined(what, report.get(key, []))
        ]
        if rows:
            show_table(("Node", "What", ">From byte", ">Bytes"), rows[:_MOST_RANGES])
        if len(rows) > _MOST_RANGES:
            click.echo(f"and {len(rows) - _MOST_RANGES} more; -o json has all.")
        click.echo(
            f"{format_size(report['compared_bytes'])} of {name} compared on {', '.join(report['compared'])}: "
            + ("equal." if report["equal"] else "; ".join(_differences(report)) + ".")
        )
    if report.get("next_steps"):
        raise click.ClickException("; ".join(report["next_steps"]))
    if report["left_bytes"]:
        raise click.ClickException(_what_is_left(name, report, full=full, repair=repair))


def _joined(what: str, ranges: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    """Rows (node, what, offset, length), those of each node in order; neighbouring ranges are one."""
    rows: list[tuple[str, str, int, int]] = []
    nodes = list(dict.fromkeys(one["node"] for one in ranges))
    for one in sorted(ranges, key=lambda one: (nodes.index(one["node"]), one["offset"])):
        node, offset, end = one["node"], one["offset"], one["offset"] + one["length"]
        if rows and rows[-1][0] == node and rows[-1][2] + rows[-1][3] >= offset:
            offset, end = rows[-1][2], max(end, rows[-1][2] + rows[-1][3])
            rows.pop()
        rows.append((node, what, offset, end - offset))
    return rows


def _what_is_left(name: str, report: dict[str, Any], *, full: bool, repair: bool) -> str:
    again = f"`terrace volume mirror verify {name} --full --repair`"
    differs = report["differing_bytes"] > report["repaired_bytes"]
    unreadable = report["unreadable_bytes"] - report["healed_bytes"]
    pool = name.partition("/")[0]
    where = (
        f"on each node `terrace pool scrub {pool}` names what is damaged there, `terrace pool check {pool}` what is "
        "lost"
    )
    if differs:
        if not full:
            again = again.replace(" --full", "")
        way_out = f"the legs of {name} are not equal: {again} writes what the primary's leg has"
        return way_out + (f"; {where}" if unreadable else "")
    if full and repair:
        return (
            f"{unreadable} bytes of {name} can't be read, and no other leg had them: write them anew or restore them; "
            f"{where}"
        )
    return (
        f"{unreadable} bytes of {name} can't be read, and nothing that can be differs: {again} has them from another "
        f"leg where one can read them; {where}"
    )


def _differences(report: dict[str, Any]) -> Iterator[str]:
    if report["differing_bytes"]:
        yield f"{report['differing_bytes']} bytes differ, {report['repaired_bytes']} of them are repaired"
    if report["unreadable_bytes"]:
        yield f"{report['unreadable_bytes']} bytes can't be read, {report['healed_bytes']} of them are healed"


def _follow(client: ApiClient, volume: tuple[str, str], node: str) -> dict[str, Any]:
    """Show progress until the leg is up to date. Raises ClickException if it stays out.

    StoppedWaitingError in the place of KeyboardInterrupt, for the resync goes on.
    """
    from terrace.apiclient import StoppedWaitingError

    try:
        return _followed(client, volume, node)
    except KeyboardInterrupt:
        raise StoppedWaitingError(_path(volume)) from None


def _followed(client: ApiClient, volume: tuple[str, str], node: str) -> dict[str, Any]:
    most, pause = 0, _FIRST_POLL_S
    with patience(f"Resyncing {volume[0]}/{volume[1]} on {node}") as advance:
        while True:
            found: dict[str, Any] = client.get(*_path(volume))
            leg = _leg(found, node)
            if leg["state"] in _UNTIL:
                return found
            if leg["error"] and (leg["error"].startswith("split brain") or leg.get("kept_out")):
                raise click.ClickException(leg["error"])
            if found["role"] != "primary":
                raise click.ClickException(
                    f"node {found['primary']} is the primary of {found['volume']}: run this there"
                )
            if leg["to_sync_bytes"] is not None:
                most = max(most, leg["to_sync_bytes"])
                if most:
                    advance(most - leg["to_sync_bytes"], most)
            time.sleep(pause)
            pause = min(pause * 1.2, _LONGEST_POLL_S)


def _is_at(leg: dict[str, Any], place: str) -> bool:
    if leg["kind"] != "nbd" or "://" not in place:
        return place_of(leg) == place
    from nbd.uri import export_of  # only few commands need it

    return export_of(leg["export"]) == export_of(place)


def _leg(found: dict[str, Any], node: str) -> dict[str, Any]:
    leg = next((leg for leg in found["legs"] if _is_at(leg, node)), None)
    if leg is None:
        raise click.ClickException(f"{found['volume']} has no leg on {node}; terrace volume mirror add makes one")
    return dict(leg)
