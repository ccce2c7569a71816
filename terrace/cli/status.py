"""`terrace status`: the daemon, its clients and its pools at a glance."""

from __future__ import annotations

from typing import Any

import click

from terrace.cli.context import Context, pass_context
from terrace.cli.mirror import place_of, unreadable
from terrace.cli.node import show_nodes
from terrace.cli.output import duration, output_option, say, show_facts, show_json, show_table
from terrace.cli.pool import show_pools
from terrace.sizes import format_size


@click.command()
@output_option
@pass_context
def status(context: Context, output: str) -> None:
    """Show the daemon, its NBD clients and its pools."""
    with context.connect() as client:
        found = client.get("status")
    if output == "json":
        show_json(found)
        return
    nbd = found["nbd"]
    total = nbd["total"]
    show_facts(
        [
            ("Daemon", f"terraced {found['version']}, process {found['pid']}, up {duration(found['uptime_s'])}"),
            *_upgrade(found),
            ("Home", found["home"]),
            ("Memory", format_size(found["resident_bytes"])),
            ("Longest loop stall", f"{found['loop_stall_max_ms']:.1f} ms"),
            *(("NBD", uri) for uri in nbd["uris"]),
            *_arbiter(found["arbiter"]),
            ("Requests", f"{total['requests']}, {total['errors']} of them answered with an error"),
            ("Transferred", f"{format_size(total['read_bytes'])} read, {format_size(total['written_bytes'])} written"),
        ]
    )
    click.echo()
    show_pools(found["pools"])
    if found["nodes"]:
        click.echo()
        show_nodes(found["nodes"])
    if found["mirrors"]:
        click.echo()
        show_status_of_mirrors(found["mirrors"])
    if nbd["connections"]:
        click.echo()
        rows = [
            (
                _export(connection),
                connection["peer"],
                connection["counters"]["reads"],
                connection["counters"]["writes"],
                connection["counters"]["flushes"],
                connection["counters"]["errors"],
                format_size(connection["counters"]["read_bytes"]),
                format_size(connection["counters"]["written_bytes"]),
            )
            for connection in nbd["connections"]
        ]
        columns = ("Export", "Client", ">Reads", ">Writes", ">Flushes", ">Errors", ">Read", ">Written")
        show_table(columns, rows, spare=(">Flushes", ">Reads", ">Writes"))


def _export(connection: dict[str, Any]) -> str:
    if connection["kind"] == "takeover":
        return "(another node)"
    return connection["export"] or "(handshake)"


def _arbiter(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Whether etcd answers, where it is configured."""
    if found is None:
        return []
    how = f"answers in {1000 * found['latency_s']:.1f} ms" if found["answers"] else found["problem"]
    return [("Arbiter", f"{found['kind']} at {', '.join(found['endpoints'])}: {how}")]


def show_status_of_mirrors(mirrors: list[dict[str, Any]]) -> None:
    """A table with a line for each mirror."""
    rows = []
    for one in mirrors:
        first, *others = _legs(one)
        rows.append((one["volume"], one["state"], one["role"], one["primary"] or "none", first))
        rows += [("", "", "", "", leg) for leg in others]
    show_table(("Mirror", "State", "Here", "Primary", "Legs"), rows, spare=("Primary",))
    for one in mirrors:
        if damage := unreadable(one):
            click.echo()
            say(f"{one['volume']}: {damage}")


def _legs(mirror: dict[str, Any]) -> list[str]:
    """In lines: those on nodes in one, and each on an NBD server, whose URI may be long, in its own."""
    nodes = [f"{place_of(leg)} {leg['state']}" for leg in mirror["legs"] if leg["kind"] == "terrace"]
    return [", ".join(nodes)] + [f"{place_of(leg)} {leg['state']}" for leg in mirror["legs"] if leg["kind"] == "nbd"]


def _upgrade(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What became of the last one, or becomes of one that is under way."""
    upgrade, how = found["upgrade"], found["succession"]
    if upgrade["state"] != "idle":
        return [("Upgrade", f"under way: {upgrade['state']}")]
    if upgrade["error"]:
        return [("Upgrade", f"came to nothing: {upgrade['error']}")]
    if how is None:
        return []
    waited = f"{how['clients']} client{'s' * (how['clients'] != 1)} waited for {how['pause_s']:.2f} s"
    return [("Upgrade", f"took over from {how['from_version']}, process {how['from_pid']}; {waited}")]
