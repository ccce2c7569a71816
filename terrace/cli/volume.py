"""`terrace volume`: create, list, show, resize and delete volumes."""

from __future__ import annotations

from typing import Any

import click

from terrace.cli.context import POOL, SIZE, VOLUME, Context, SizeCommand, confirm, pass_context
from terrace.cli.heat import heat
from terrace.cli.output import output_option, patience, percent, show_facts, show_json
from terrace.cli.policy import POLICY
from terrace.cli.pool import show_volumes, shown_policy
from terrace.sizes import format_size


@click.group()
def volume() -> None:
    """Volumes: thin block devices, exported over NBD as POOL/VOL."""


@volume.command(cls=SizeCommand)
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.argument("size", type=SIZE)
@click.option("--policy", type=POLICY, default="default", show_default=True, help="One that terrace policy list shows.")
@output_option
@pass_context
def create(context: Context, volume: tuple[str, str], size: int, policy: str, output: str) -> None:
    """Create a volume. It takes no space until it is written to."""
    pool, name = volume
    with context.connect() as client:
        body = {"name": name, "size": size, "policy": policy}
        made = client.request("POST", "pools", pool, "volumes", body=body)
        uris = _uris(client, made["name"])
    if output == "json":
        show_json(made | {"uris": uris})
    else:
        click.echo(f"Volume {made['name']} has {format_size(made['size_bytes'])}: {uris[0]}")


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
        uris = _uris(client, found["name"])
    if output == "json":
        show_json(found | {"uris": uris})
        return
    size_bytes, mapped_bytes = found["size_bytes"], found["mapped_bytes"]
    show_facts(
        [
            ("Volume", found["name"]),
            ("Size", f"{format_size(size_bytes)} ({size_bytes} bytes)"),
            ("Mapped", f"{format_size(mapped_bytes)} ({percent(mapped_bytes, size_bytes)})"),
            ("Policy", shown_policy(found, remedy=True)),
            ("Clients", found["open_count"]),
            *([("Waiting", _waiting(found))] if found["throttled"] or found["queued"] else []),
            *(("NBD URI", uri) for uri in uris),
        ]
    )


@volume.command(cls=SizeCommand)
@click.argument("volume", type=VOLUME, metavar="POOL/VOL")
@click.argument("size", type=SIZE)
@click.option("--shrink", "--force", "shrink", is_flag=True, help="Allow a smaller size: what lies behind it IS LOST.")
@output_option
@pass_context
def resize(context: Context, volume: tuple[str, str], size: int, shrink: bool, output: str) -> None:
    """Give a volume another size. New space reads as zeros."""
    pool, name = volume
    with context.connect() as client, patience(f"Resizing {pool}/{name}"):
        resized = client.request("PATCH", "pools", pool, "volumes", name, body={"size": size, "shrink": shrink})
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
def delete(context: Context, volume: tuple[str, str], yes: bool, output: str) -> None:
    """Delete a volume and all its data."""
    pool, name = volume
    with context.connect() as client:
        found = client.get("pools", pool, "volumes", name)
        confirm(f"Delete volume {found['name']} with {format_size(found['mapped_bytes'])} of data for good?", yes=yes)
        with patience(f"Deleting {found['name']}"):
            client.request("DELETE", "pools", pool, "volumes", name)
    if output == "json":
        show_json({"deleted": found["name"]})
    else:
        click.echo(f"Volume {found['name']} is deleted.")


def _waiting(volume: dict[str, Any]) -> str:
    counts = ((volume["throttled"], "for the limits of the policy"), (volume["queued"], "for room in the pool"))
    return ", ".join(f"{count} request{'s'[: count != 1]} {what}" for count, what in counts if count)


volume.add_command(heat)


def _uris(client: Any, export: str) -> list[str]:
    """The NBD URIs of one export, one for each address that the daemon listens on."""
    uris = []
    for uri in client.get("status")["nbd"]["uris"]:
        base, question, query = uri.partition("?")
        uris.append(f"{base}{export}{question}{query}")
    return uris
