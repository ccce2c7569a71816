"""`terrace snapshot`: take, list, show, delete, rename, hold and release snapshots, and roll volumes back to them."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.context import NEW_SNAPSHOT, PLACE, SNAPSHOT, VOLUME, Context, confirm, pass_context
from terrace.cli.output import count, duration, output_option, patience, show_facts, show_json, show_table, uris_of
from terrace.sizes import format_size

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient

Name = tuple[str, str, str]
"""Pool, volume and snapshot."""


LOCAL = click.option(
    "--local", is_flag=True, help="Of a mirror, only on the leg here, though another node is its primary."
)


@click.group()
def snapshot() -> None:
    """Snapshots: what volumes were at some moment, exported read-only as POOL/VOL@SNAP."""


@snapshot.command()
@click.argument("names", nargs=-1, required=True, metavar="POOL/VOL@SNAP | --group SNAP POOL/VOL...")
@click.option("--group", metavar="SNAP", help="A snapshot of this name of each volume, all of one instant.")
@LOCAL
@click.option("--force", is_flag=True, help="With --local: even of a leg that is just being resynced, a mixture.")
@output_option
@pass_context
@click.pass_context
def create(
    ctx: click.Context,
    context: Context,
    names: tuple[str, ...],
    group: str | None,
    local: bool,
    force: bool,
    output: str,
) -> None:
    """Take a snapshot of a volume, or of several volumes of a pool at one instant.

    It is as if the power had failed at that instant: what a filesystem has not written yet is not in it. It costs the
    same at any size, while clients go on. Of a mirror it is taken at the primary, on every leg that is up to date.

    \b
    terrace snapshot create demo/vol@monday
    terrace snapshot create --group monday demo/database demo/log
    """
    if force and not local:
        raise click.UsageError("--force goes with --local, which takes a snapshot of the leg here only", ctx)
    pool, volumes, name = _wanted(ctx, names, group)
    what = f"{len(volumes)} volumes of pool {pool}" if len(volumes) > 1 else f"{pool}/{volumes[0]}"
    with context.connect() as client, patience(f"Taking a snapshot of {what}"):
        body = {"name": name, "volumes": volumes} | ({"local": True, "force": force} if local else {})
        taken = client.request("POST", "pools", pool, "snapshots", body=body)
        uris = [_reached(client, one) for one in taken[:1]]
    if output == "json":
        show_json(taken)
        return
    for one in taken:
        if one["id"] is None:
            click.echo(f"Snapshot {one['name']} was taken on other nodes only.")
        elif len(taken) == 1:
            click.echo(f"Snapshot {one['name']} shows {format_size(one['referenced_bytes'])}: {uris[0]}")
        else:
            click.echo(f"Snapshot {one['name']} shows {format_size(one['referenced_bytes'])}.")
        for node, why in one["lacking"].items():
            click.echo(f"Node {node} doesn't have it: {why}.")
    if len(taken) > 1:
        click.echo(f"All {len(taken)} are of one instant.")


def _reached(client: ApiClient, one: dict[str, Any]) -> str:
    """How to get a snapshot: its URI, or where it is, if this node has no leg of the mirror."""
    if (there := one.get("on")) is not None:
        return f"{there['export']} on node {there['node']}"
    return uris_of(client, one["name"])[0]


def _wanted(ctx: click.Context, names: Sequence[str], group: str | None) -> tuple[str, list[str], str]:
    """Pool, volumes and name of the snapshots that the arguments ask for."""
    if group is None:
        full = [NEW_SNAPSHOT.convert(name, None, ctx) for name in names]
        if len({(pool, snap) for pool, _, snap in full}) > 1:
            raise click.UsageError(
                "several snapshots are taken at one instant, of one pool and under one name: --group SNAP POOL/VOL...",
                ctx,
            )
        return full[0][0], [volume for _, volume, _ in full], full[0][2]
    if "@" in group or "/" in group:
        raise click.UsageError(f"{group!r} can't be the name of snapshots: it has no @ and no slash", ctx)
    volumes = [VOLUME.convert(name, None, ctx) for name in names]
    pools = list(dict.fromkeys(pool for pool, _ in volumes))
    if len(pools) > 1:
        raise click.UsageError(
            f"volumes of pools {pools[0]} and {pools[1]} have no instant in common: take a group of each pool", ctx
        )
    return pools[0], [volume for _, volume in volumes], group


@snapshot.command("list")
@click.argument("place", type=PLACE, required=False, metavar="[POOL|POOL/VOL]")
@output_option
@pass_context
def list_snapshots(context: Context, place: tuple[str, str | None] | None, output: str) -> None:
    """List the snapshots of a volume, of a pool, or all.

    What is exclusive comes back when that snapshot alone is deleted; what is shared, other versions have too. Of
    mirrors it is told which nodes have it, `?` behind those that can't be asked; sizes are of the leg here.
    """
    with context.connect() as client, patience("Counting what snapshots share"):
        if place is None:
            names = [found["name"] for found in client.get("pools") if "volumes" in found]
            names += client.get("diskless")
            found = [one for name in names for one in _listed(client, "pools", name, "snapshots")]
        elif place[1] is None:
            found = _listed(client, "pools", place[0], "snapshots")
        else:
            found = _listed(client, "pools", place[0], "volumes", place[1], "snapshots")
    if output == "json":
        show_json(found)
        return
    now_s = time.time()
    mirrored = any(one["legs"] for one in found)
    rows = [
        (
            one["name"],
            _moment(one["created_at"]),
            duration(max(0.0, now_s - one["created_at"])),
            *("-" if one[key] is None else format_size(one[key]) for key in _SIZES),
            *([_on_legs(one)] if mirrored else []),
            _kept_by(one),
        )
        for one in found
    ]
    columns: tuple[str, ...] = ("Snapshot", "Created", ">Age", ">Refers to", ">Shared", ">Exclusive")
    columns += ("On nodes", "Kept by") if mirrored else ("Kept by",)
    empty = "There are no snapshots; terrace snapshot create POOL/VOL@SNAP takes one."
    show_table(columns, rows, empty=empty, spare=("Created", ">Shared", ">Refers to"))


_SIZES = ("referenced_bytes", "shared_bytes", "exclusive_bytes")


def _listed(client: ApiClient, *path: str) -> list[dict[str, Any]]:
    """Those on other nodes too."""
    return list(client.request("GET", *path, query={"legs": "1"}))


def _on_legs(one: dict[str, Any]) -> str:
    """`a, b`; `a, not b, c?` if b lacks it and c can't be asked."""
    legs = one["legs"]
    if legs is None:
        return "-"
    return ", ".join(
        [*legs["on"], *(f"not {node}" for node in legs["missing"]), *(f"{node}?" for node in legs["unknown"])]
    )


def _kept_by(one: dict[str, Any]) -> str:
    """Why it, or its space, stays: `hold, 2 clones, 1 client`. `rollback`: the volume itself was made of it."""
    clones, clients = [clone for clone in one["clones"] if clone != one["volume"]], one["open_count"]
    parts = ["hold"] if one["held"] else []
    parts += ["rollback"] if len(clones) < len(one["clones"]) else []
    parts += [f"clone {clones[0]}"] if len(clones) == 1 else [f"{len(clones)} clones"] if clones else []
    parts += [count(clients, "client")] if clients else []
    parts += [f"on node {one['on']['node']}"] if "on" in one else []
    return ", ".join(parts) or "-"


def _clone(one: dict[str, Any], clone: str) -> str:
    return f"{clone} itself, since it was rolled back to this" if clone == one["volume"] else clone


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


@snapshot.command()
@click.argument("name", type=SNAPSHOT, metavar="POOL/VOL@SNAP")
@output_option
@pass_context
def show(context: Context, name: Name, output: str) -> None:
    """Show one snapshot, and how to reach it."""
    with context.connect() as client:
        found = client.request("GET", *_path(name), query={"legs": "1"})
        origin = client.get("pools", name[0], "volumes", name[1])["origin"]
        uris = uris_of(client, found["name"])
    if output == "json":
        show_json(found | {"origin": origin, "uris": uris})
        return
    created = datetime.fromtimestamp(found["created_at"]).strftime("%Y-%m-%d %H:%M:%S")
    clones = found["clones"]
    show_facts(
        [
            ("Snapshot", found["name"]),
            ("Of volume", found["volume"] + (f", a clone of {origin}" if origin else "")),
            ("Created", f"{created}, {duration(max(0.0, time.time() - found['created_at']))} ago"),
            ("Size", f"{format_size(found['size_bytes'])} ({found['size_bytes']} bytes)"),
            ("Refers to", format_size(found["referenced_bytes"])),
            ("Shared", f"{format_size(found['shared_bytes'])}, which other versions have too"),
            (
                "Exclusive",
                f"{format_size(found['exclusive_bytes'])}, which would come back if it were deleted"
                + (": nothing, while there are clones of it" if clones else ""),
            ),
            ("Clones", ", ".join(_clone(found, clone) for clone in clones) or "none"),
            ("Hold", "held: it can't be deleted until it is released" if found["held"] else "none"),
            ("Clients", found["open_count"]),
            *([("On nodes", _on_legs(found))] if found["legs"] else []),
            *(("NBD URI", uri) for uri in uris),
        ]
    )


@snapshot.command()
@click.argument("names", type=SNAPSHOT, nargs=-1, required=True, metavar="POOL/VOL@SNAP...")
@LOCAL
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_option
@pass_context
def delete(context: Context, names: tuple[Name, ...], local: bool, yes: bool, output: str) -> None:
    """Delete snapshots. What only they have comes back in the background; that needs no free space.

    One that has clones is deleted too: they stay as they are, and what they need of it goes with the last of them. Of a
    mirror it is deleted at the primary, on all legs; a node that is away deletes it when it is back.
    """
    names = tuple(dict.fromkeys(names))
    done: list[dict[str, Any]] = []
    with context.connect() as client:
        found = [_find(client, name) for name in names]  # so that a wrong name refuses all
        for one in found:
            _require_deletable(one)
        confirm(_question(found), yes=yes)
        with patience(f"Deleting {count(len(names), 'snapshot')}") as advance:
            for name in names:
                advance(sum(one["freed_bytes"] for one in done), max(1, sum(one["exclusive_bytes"] for one in found)))
                done.append(client.request("DELETE", *_path(name), query={"local": "1"} if local else None))
                if output != "json":
                    click.echo(_told(done[-1]))
                    _tell_left(done[-1])
    if output == "json":
        show_json(done)
    elif len(done) > 1:
        click.echo(f"{format_size(sum(one['freed_bytes'] for one in done))} come back in all.")


def _find(client: ApiClient, name: Name) -> dict[str, Any]:
    """One that is here, or on another leg of the mirror."""
    try:
        return _get(client, name)
    except OSError as error:
        if error.errno == errno.ENOENT:
            for one in _listed(client, "pools", name[0], "volumes", name[1], "snapshots"):
                if one["snapshot"] == name[2]:
                    return one | {"exclusive_bytes": 0}
        raise


def _tell_left(done: dict[str, Any]) -> None:
    for sentence in done["left"]:
        click.echo(f"Left: {sentence}.")


def _require_deletable(one: dict[str, Any]) -> None:
    if one["held"]:
        raise click.ClickException(
            f"{one['name']} is held, so nothing was deleted: terrace snapshot release {one['name']}"
        )
    if one["open_count"]:
        raise click.ClickException(
            f"{one['name']} is in use by {count(one['open_count'], 'client')}, so nothing was deleted: terrace status "
            "names them"
        )


def _question(found: Sequence[dict[str, Any]]) -> str:
    if len(found) == 1:
        (one,) = found
        return f"Delete snapshot {one['name']} with {format_size(one['exclusive_bytes'])} that only it has, for good?"
    shown = ", ".join(one["name"] for one in found[:5]) + (", ..." if len(found) > 5 else "")
    return f"Delete {len(found)} snapshots ({shown}) for good?"


def _told(one: dict[str, Any]) -> str:
    if one["clones"]:
        return f"Snapshot {one['deleted']} is deleted; its blocks stay for {', '.join(one['clones'])}."
    return f"Snapshot {one['deleted']} is deleted; {format_size(one['freed_bytes'])} come back."


@snapshot.command()
@click.argument("name", type=SNAPSHOT, metavar="POOL/VOL@OLD")
@click.argument("new_name", metavar="NEW")
@LOCAL
@output_option
@pass_context
def rename(context: Context, name: Name, new_name: str, local: bool, output: str) -> None:
    """Give a snapshot another name. Its clients aren't disturbed."""
    pool, volume, _ = name
    new_name = new_name.removeprefix(f"{pool}/{volume}@")
    if "@" in new_name or "/" in new_name:
        raise click.UsageError(f"{new_name!r} can't be its name: a snapshot stays with its volume; write NEW alone")
    with context.connect() as client:
        changed = client.request("PATCH", *_path(name), body={"name": new_name} | ({"local": True} if local else {}))
    if output == "json":
        show_json(changed)
    else:
        click.echo(f"Snapshot {'@'.join(('/'.join(name[:2]), name[2]))} is now {changed['name']}.")
        _tell_left(changed)


@snapshot.command()
@click.argument("name", type=SNAPSHOT, metavar="POOL/VOL@SNAP")
@LOCAL
@output_option
@pass_context
def hold(context: Context, name: Name, local: bool, output: str) -> None:
    """Protect a snapshot from being deleted, by schedules or by hand, until it is released."""
    _set_held(context, name, output, held=True, local=local)


@snapshot.command()
@click.argument("name", type=SNAPSHOT, metavar="POOL/VOL@SNAP")
@LOCAL
@output_option
@pass_context
def release(context: Context, name: Name, local: bool, output: str) -> None:
    """Let a held snapshot be deleted again."""
    _set_held(context, name, output, held=False, local=local)


def _set_held(context: Context, name: Name, output: str, *, held: bool, local: bool) -> None:
    with context.connect() as client:
        changed = client.request("PATCH", *_path(name), body={"held": held} | ({"local": True} if local else {}))
    if output == "json":
        show_json(changed)
    else:
        state = "held: it can't be deleted until it is released" if held else "not held"
        click.echo(f"Snapshot {changed['name']} is {state}.")
        _tell_left(changed)


@snapshot.command()
@click.argument("name", type=SNAPSHOT, metavar="POOL/VOL@SNAP")
@click.option("--keep-as", metavar="SNAP", help="Name of the safety snapshot (default: before-rollback-DATE-TIME).")
@click.option("--no-safety", is_flag=True, help="Keep no snapshot: WHAT WAS WRITTEN SINCE IS LOST.")
@click.option("--force", is_flag=True, help="Even while clients use the volume: WHAT THEY HAVE MOUNTED BREAKS.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask, where --no-safety or --force lose data.")
@output_option
@pass_context
def rollback(
    context: Context, name: Name, keep_as: str | None, no_safety: bool, force: bool, yes: bool, output: str
) -> None:
    """Make a volume what it was when a snapshot of it was taken.

    What it is now is kept as a snapshot first, so that a rollback can be undone, unless it is not complete (see terrace
    volume show). All snapshots stay, newer ones too.

    It is refused while the volume is in use. With --force it happens nevertheless: all requests of its present
    connections fail from then on, and what was not flushed is in no snapshot. Unmount, disconnect, connect anew.
    """
    if keep_as is not None and no_safety:
        raise click.UsageError("--keep-as names the safety snapshot that --no-safety does without")
    if keep_as is not None and ("@" in keep_as or "/" in keep_as):
        raise click.UsageError(f"{keep_as!r} can't name a snapshot of the same volume; write SNAP alone")
    pool, volume, _ = name
    with context.connect() as client:
        wanted = _get(client, name)
        now = client.get("pools", pool, "volumes", volume)
        if force and now["open_count"]:
            who = ", ".join(
                one["peer"] for one in client.get("status")["nbd"]["connections"] if one["export"] == now["name"]
            )
            confirm(
                f"{now['name']} is in use by {who}: from now on all their requests will fail, what they have mounted "
                f"breaks, and what they have not flushed is lost. Roll it back to {wanted['name']}?",
                yes=yes,
            )
        elif (no_safety or now["filling"]) and (force or not now["open_count"]):
            confirm(
                f"Roll {now['name']} back to {wanted['name']} and give up what was written since, for good?", yes=yes
            )
        body = {"safety": not no_safety, "force": force} | ({"keep_as": keep_as} if keep_as else {})
        with patience(f"Rolling back {now['name']}"):
            done = client.request("POST", *_path(name), "rollback", body=body)
    if output == "json":
        show_json(done)
        return
    click.echo(f"Volume {done['volume']['name']} is what it was at {done['snapshot']}.")
    if done["volume"]["size_bytes"] != now["size_bytes"]:
        was, is_now = now["size_bytes"], done["volume"]["size_bytes"]
        click.echo(f"It has {format_size(is_now)} again, as then; it had {format_size(was)}.")
    if done["kept_as"]:
        click.echo(f"What it was before is {done['kept_as']}: roll back to that to undo this.")
    if done["cut_off"]:
        click.echo(f"These must connect anew: {', '.join(done['cut_off'])}.")


def _path(name: Name) -> tuple[str, ...]:
    return ("pools", name[0], "volumes", name[1], "snapshots", name[2])


def _get(client: ApiClient, name: Name) -> dict[str, Any]:
    return dict(client.get(*_path(name)))
