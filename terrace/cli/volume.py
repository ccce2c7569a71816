"""`terrace volume`: create, clone, list, show, resize, import, export, complete and delete volumes."""

from __future__ import annotations

import math
from typing import Any

import click

from terrace.cli.attach import grow_device, require_detached
from terrace.cli.context import POOL, SIZE, SNAPSHOT, VOLUME, Context, SizeCommand, confirm, pass_context
from terrace.cli.heat import heat
from terrace.cli.images import export_volume, import_image
from terrace.cli.mirror import mirror, place_of
from terrace.cli.mirrorbrief import brief, served_elsewhere
from terrace.cli.node import LEG_PLACE
from terrace.cli.output import count, output_option, patience, show_facts, show_json, uris_of
from terrace.cli.policy import POLICY
from terrace.cli.pool import show_volumes, shown_mapped, shown_policy, shown_state
from terrace.sizes import format_size


@click.group()
def volume() -> None:
    """Volumes: thin block devices, exported over NBD as POOL/VOL."""


@volume.command(cls=SizeCommand)
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.argument("size", type=SIZE)
@click.option("--policy", type=POLICY, default="default", show_default=True, help="One that terrace policy list shows.")
@click.option(
    "--mirror",
    "places",
    type=LEG_PLACE,
    multiple=True,
    metavar="NODE[/POOL]|URI",
    help="A leg on that node, or on the NBD server of a URI, too; may be repeated.",
)
@click.option(
    "--quorum",
    type=click.Choice(["suspend", "fail"]),
    help="What becomes of writes to a mirror that can't be acknowledged safely: they wait (the default), or fail.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.5, 60),
    metavar="SECONDS",
    help="So long a leg of a mirror may be silent before writes go on without it (5 unless said otherwise).",
)
@click.option(
    "--arbiter",
    type=click.Choice(["legs", "etcd"]),
    help="Who decides which node may serve a mirror: its nodes themselves (the default), or etcd; see [etcd].",
)
@output_option
@pass_context
def create(
    context: Context,
    volume: tuple[str, str],
    size: int,
    policy: str,
    places: tuple[tuple[str, str | None], ...],
    quorum: str | None,
    timeout_s: float | None,
    arbiter: str | None,
    output: str,
) -> None:
    """Create a volume. It takes no space until it is written to."""
    pool, name = volume
    if not places and (quorum, timeout_s, arbiter) != (None, None, None):
        raise click.UsageError("--quorum, --timeout and --arbiter are about a mirror: say --mirror NODE, too")
    if timeout_s is not None and math.isnan(timeout_s):
        raise click.UsageError("--timeout nan is no time; write seconds, from 0.5 to 60")
    with context.connect() as client, patience(f"Creating {pool}/{name}"):
        body: dict[str, Any] = {"name": name, "size": size, "policy": policy}
        if places:
            body["mirror"] = [{"node": node, "pool": there} for node, there in places]
            asked = {"quorum": quorum, "timeout_s": timeout_s, "arbiter": arbiter}
            body |= {key: value for key, value in asked.items() if value is not None}
        made = client.request("POST", "pools", pool, "volumes", body=body)
        uris = uris_of(client, made["name"])
    if output == "json":
        show_json(made | {"uris": uris})
    else:
        mirrored = f", mirrored to {', '.join(node for node, _ in places)}" if places else ""
        click.echo(f"Volume {made['name']} has {format_size(made['size_bytes'])}{mirrored}: {uris[0]}")


@volume.command()
@click.argument("name", type=SNAPSHOT, metavar="POOL/VOL@SNAP")
@click.argument("new", type=VOLUME, metavar="POOL/NEW")
@click.option("--policy", type=POLICY, help="Default: that of the snapshot's volume.")
@output_option
@pass_context
def clone(context: Context, name: tuple[str, str, str], new: tuple[str, str], policy: str | None, output: str) -> None:
    """Make a volume that begins as a snapshot is. It costs the same at any size, and takes no space at first."""
    pool, volume, snapshot = name
    if new[0] != pool:
        raise click.UsageError(
            f"a clone lives in the pool of its snapshot, {pool}: write {pool}/{new[1]}; to have a copy in pool "
            f"{new[0]}, export the snapshot and import that"
        )
    with context.connect() as client:
        body = {"name": new[1]} | ({"policy": policy} if policy else {})
        made = client.request("POST", "pools", pool, "volumes", volume, "snapshots", snapshot, "clone", body=body)
        uris = uris_of(client, made["name"])
    if output == "json":
        show_json(made | {"uris": uris})
    else:
        click.echo(
            f"Volume {made['name']} has {format_size(made['size_bytes'])}, a clone of {made['origin']}: {uris[0]}"
        )


@volume.command()
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@output_option
@pass_context
def promote(context: Context, volume: tuple[str, str], output: str) -> None:
    """Make a clone independent of its origin, by copying what it shares with it, while clients use it.

    That takes as much space as is copied. One that is interrupted goes on where it was when it is called again.
    """
    pool, name = volume
    found: dict[str, Any] = {}
    with context.connect() as client, patience(f"Promoting {pool}/{name}") as advance:
        origin = client.get("pools", pool, "volumes", name)["origin"]
        try:
            for line in client.stream("POST", "pools", pool, "volumes", name, "promote"):
                if "volume" in line:
                    found = line["volume"]
                elif line["total_bytes"]:
                    advance(line["done_bytes"], line["total_bytes"])
        except KeyboardInterrupt:
            raise click.ClickException(
                f"stopped; {pool}/{name} still needs {origin}: terrace volume promote {pool}/{name} goes on"
            ) from None
    if output == "json":
        show_json(found)
    else:
        click.echo(f"Volume {found['name']} needs {origin} no more; {format_size(found['mapped_bytes'])} are its own.")


@volume.command("list")
@click.argument("pool", type=POOL, required=False)
@output_option
@pass_context
def list_volumes(context: Context, pool: str | None, output: str) -> None:
    """List the volumes of POOL, or of all pools."""
    with context.connect() as client:
        if pool is not None:
            volumes = client.get("pools", pool, "volumes")
        else:
            volumes = [volume for found in client.get("pools") for volume in found.get("volumes", ())]
            volumes += [volume for name in client.get("diskless") for volume in client.get("pools", name, "volumes")]
    if output == "json":
        show_json(volumes)
    else:
        show_volumes(volumes, empty="There are no volumes; terrace volume create POOL/VOL SIZE makes one.")


@volume.command()
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@output_option
@pass_context
def show(context: Context, volume: tuple[str, str], output: str) -> None:
    """Show one volume, and how to reach it."""
    pool, name = volume
    with context.connect() as client:
        found = client.get("pools", pool, "volumes", name)
        elsewhere = served_elsewhere(found["mirror"])
        uris = uris_of(client, found["name"]) if elsewhere is None else []
    if output == "json":
        show_json(found | {"uris": uris})
        return
    size_bytes, (mapped, share) = found["size_bytes"], shown_mapped(found)
    show_facts(
        [
            ("Volume", found["name"]),
            *([("State", shown_state(found, remedy=True))] if found["filling"] else []),
            ("Size", f"{format_size(size_bytes)} ({size_bytes} bytes)"),
            ("Mapped", "-" if mapped == "-" else f"{mapped} ({share})" + _own(found)),
            *([("Origin", _origin(found))] if found["origin"] else []),
            ("Snapshots", found["snapshots"]),
            ("Policy", shown_policy(found, remedy=True)),
            *([("Mirror", brief(found["mirror"]))] if found["mirror"] else []),
            ("Clients", found["open_count"]),
            *([("Waiting", _waiting(found))] if found["throttled"] or found["queued"] else []),
            *(("NBD URI", uri) for uri in uris),
            *([("NBD URI", elsewhere)] if elsewhere else []),
        ]
    )


def warn_of_resync(mirror: dict[str, Any] | None) -> None:
    """What a resize may cost, before it."""
    legs = mirror["legs"] if mirror is not None and mirror["role"] == "primary" else []
    for leg in legs:
        if leg["state"] == "Syncing":
            click.echo(f"The resync of the leg on {place_of(leg)} may have to begin again after this.", err=True)


@volume.command(cls=SizeCommand)
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.argument("size", type=SIZE)
@click.option("--shrink", "--force", "shrink", is_flag=True, help="Allow a smaller size: what lies behind it IS LOST.")
@output_option
@pass_context
def resize(context: Context, volume: tuple[str, str], size: int, shrink: bool, output: str) -> None:
    """Give a volume another size. New space reads as zeros."""
    pool, name = volume
    if shrink:
        require_detached(context, f"{pool}/{name}", "shrunk")
    with context.connect() as client, patience(f"Resizing {pool}/{name}"):
        warn_of_resync(client.get("pools", pool, "volumes", name)["mirror"])
        resized = client.request("PATCH", "pools", pool, "volumes", name, body={"size": size, "shrink": shrink})
        grow_device(context, resized["name"], resized["size_bytes"])
    if output == "json":
        show_json(resized)
    else:
        click.echo(f"Volume {resized['name']} has {format_size(resized['size_bytes'])}.")


@volume.command()
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.argument("policy", type=POLICY, required=False)
@output_option
@pass_context
def policy(context: Context, volume: tuple[str, str], policy: str | None, output: str) -> None:
    """Show a volume's policy, or give it another. That takes effect at once, also for requests that wait."""
    pool, name = volume
    with context.connect() as client:
        if policy is None:
            found = client.get("pools", pool, "volumes", name)
        else:
            found = client.request("PUT", "pools", pool, "volumes", name, "policy", body={"policy": policy})
    if output == "json":
        show_json(found)
    else:
        click.echo(f"Volume {found['name']} has the policy {shown_policy(found, remedy=True)}.")


@volume.command()
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_option
@pass_context
def complete(context: Context, volume: tuple[str, str], yes: bool, output: str) -> None:
    """Declare a volume complete that an import or a restore has begun to fill, and not ended.

    For one of which you know that nothing is missing, or where what is there is all that is left. It can have
    snapshots then, and is exported, like any other.
    """
    pool, name = volume
    with context.connect() as client:
        found = client.get("pools", pool, "volumes", name)
        if found["filling"]:
            if found["open_count"]:
                raise click.ClickException(
                    f"{found['name']} is in use by {count(found['open_count'], 'client')}, which may be filling it: "
                    "wait until that has ended, or disconnect it first"
                )
            confirm(
                f"Nothing says that {found['name']} holds all that it was to be filled with. Take it for complete?",
                yes=yes,
            )
            body = {"filling": False}
            found = client.request("PUT", "pools", pool, "volumes", name, "filling", body=body)
    if output == "json":
        show_json(found)
    else:
        click.echo(f"Volume {found['name']} is complete.")


@volume.command()
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.option("--snapshots", is_flag=True, help="And all its snapshots. Clones of them stay as they are.")
@click.option("--force", is_flag=True, help="Of a mirror, only the leg here, though this node isn't its primary.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_option
@pass_context
def delete(context: Context, volume: tuple[str, str], snapshots: bool, force: bool, yes: bool, output: str) -> None:
    """Delete a volume and all its data; of a mirror, at its primary, all legs. What is offline is left and told."""
    pool, name = volume
    with context.connect() as client:
        found = client.get("pools", pool, "volumes", name)
        require_detached(context, found["name"], "deleted")
        if found["snapshots"] and not snapshots:
            raise click.ClickException(
                f"{found['name']} has {count(found['snapshots'], 'snapshot')}, which terrace snapshot list "
                f"{found['name']} shows: delete them first, or with it, by --snapshots"
            )
        data = f"{format_size(found['referenced_bytes'])} of data"
        if found["snapshots"]:
            data += f" and its {count(found['snapshots'], 'snapshot')}"
        confirm(f"Delete volume {found['name']} with {data} for good?", yes=yes)
        with patience(f"Deleting {found['name']}"):
            query = {key: "1" for key, wanted in (("snapshots", snapshots), ("force", force)) if wanted}
            done = client.request("DELETE", "pools", pool, "volumes", name, query=query or None) or {"left": []}
    if output == "json":
        show_json({"deleted": found["name"], "snapshots": found["snapshots"], "left": done["left"]})
        return
    for sentence in done["left"]:
        click.echo(f"Left: {sentence}")
    if found["snapshots"]:
        click.echo(f"Volume {found['name']} and its {count(found['snapshots'], 'snapshot')} are deleted.")
    else:
        click.echo(f"Volume {found['name']} is deleted.")


def _waiting(volume: dict[str, Any]) -> str:
    counts = ((volume["throttled"], "for the limits of the policy"), (volume["queued"], "for room in the pool"))
    return ", ".join(f"{count(number, 'request')} {what}" for number, what in counts if number)


def _origin(volume: dict[str, Any]) -> str:
    rolled_back = volume["origin"].startswith(f"{volume['name']}@")
    return f"{volume['origin']}, to which it was rolled back" if rolled_back else str(volume["origin"])


def _own(volume: dict[str, Any]) -> str:
    """What of a clone is its own, not its origin's."""
    return f", of which {format_size(volume['mapped_bytes'])} are its own" if volume["origin"] else ""


for command in (heat, import_image, export_volume, mirror):
    volume.add_command(command)
