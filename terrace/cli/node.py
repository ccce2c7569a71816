"""`terrace node`: this node and its peers, and whether one may be taken down."""

from __future__ import annotations

import time
from typing import Any

import click
from click.shell_completion import CompletionItem

from terrace.cli.context import Context, ask, pass_context
from terrace.cli.output import duration, output_option, patience, say, show_facts, show_json, show_table

NO_NODES = (
    "This node has no name and so no peers; set name under [node] in the configuration, and [peers.NAME] for each of "
    "the others."
)


class NodeType(click.ParamType[str]):
    """A node's name, completed from those that are known."""

    name = "node"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if "/" in value:
            self.fail(f"{value!r} is not a node's name, which has no slash", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(one["name"]) for one in ask(ctx, "nodes") if one["name"].startswith(incomplete)]


class LegType(NodeType):
    """Which leg of a mirror is meant: its node's name, or its URI."""

    name = "node|uri"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if "://" in value else super().convert(value, param, ctx)


class LegPlaceType(click.ParamType[tuple[str, str | None]]):
    """NODE, NODE/POOL or the URI of an NBD export: where a leg is to be.

    Completed from the peers and what they have told of their pools.
    """

    name = "node[/pool]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | None]:
        if isinstance(value, tuple):
            return value
        if "://" in value:
            return value, None  # an NBD server's export; the daemon judges it
        node, slash, pool = value.partition("/")
        if not node or (slash and not pool) or "/" in pool or "@" in value:
            self.fail(f"{value!r} names no place for a leg; write NODE, NODE/POOL or an NBD URI", param, ctx)
        return node, pool or None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        others = [one for one in ask(ctx, "nodes") if not one["here"]]
        names = [one["name"] for one in others] + [f"{one['name']}/{pool}" for one in others for pool in one["pools"]]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


NODE = NodeType()
LEG = LegType()
LEG_PLACE = LegPlaceType()


@click.group()
def node() -> None:
    """Nodes: this one, and its peers, with which it mirrors volumes."""


@node.command("list")
@output_option
@pass_context
def list_nodes(context: Context, output: str) -> None:
    """List this node and its peers, and how it is with them."""
    with context.connect() as client:
        found = client.get("nodes")
    if output == "json":
        show_json(found)
    else:
        show_nodes(found)


def show_nodes(found: list[dict[str, Any]]) -> None:
    """The table of nodes."""
    rows = [
        (
            one["name"] + (" (here)" if one["here"] else ""),
            one["address"],
            one["state"],
            one["version"] or "-",
            ", ".join(one["pools"]) or "-",
            "-" if one["here"] else seen(one),
        )
        for one in found
    ]
    show_table(("Node", "Address", "State", "Version", "Pools", "Last seen"), rows, empty=NO_NODES, spare=("Version",))
    for one in found:
        if one["problem"]:
            click.echo()
            say(f"{one['name']} is {one['state'].lower()}: {one['problem']}")


def seen(one: dict[str, Any]) -> str:
    """When a node answered last."""
    if one["seen_at"] is None:
        return "never"
    passed_s = max(0.0, time.time() - one["seen_at"])
    return "now" if one["state"] == "Online" else f"{duration(passed_s)} ago"


@node.command()
@click.argument("name", type=NODE, metavar="NODE")
@output_option
@pass_context
def show(context: Context, name: str, output: str) -> None:
    """Show one node, and which legs of mirrors are on it as far as is known here."""
    with context.connect() as client:
        found = client.get("nodes", name)
    if output == "json":
        show_json(found)
        return
    show_facts(
        [
            ("Node", found["name"] + (" (this one)" if found["here"] else "")),
            ("State", found["state"]),
            *([("Problem", found["problem"])] if found["problem"] else []),
            ("Address", found["address"]),
            ("Encrypted", "yes" if found["encrypted"] else "no, in plain text over the loopback"),
            ("Version", found["version"] or "-"),
            ("Home", found["home_id"] or "-"),
            ("Pools", ", ".join(found["pools"]) or "-"),
            *([] if found["here"] else [("Last seen", seen(found))]),
            ("Legs", len(found["legs"])),
        ]
    )
    if found["legs"]:
        click.echo()
        rows = [(leg["volume"], leg["pool"], leg["role"], leg["state"]) for leg in found["legs"]]
        show_table(("Mirror", "Pool", "Role", "State"), rows)


@node.command()
@click.argument("name", type=NODE, metavar="NODE")
@click.option("--to", type=NODE, metavar="NODE", help="Who is to take its mirrors over (default: any that may).")
@click.option("--dry-run", is_flag=True, help="Only say what would be done, and what is in the way.")
@output_option
@pass_context
def drain(context: Context, name: str, to: str | None, dry_run: bool, output: str) -> None:
    """Make this node ready to be taken down: it stops being primary of mirrors.

    Refuses where a mirror has its only up-to-date leg here, and where clients are connected to one. Exit status 1: it
    is not safe to take the node down yet.
    """
    with context.connect() as client:
        plan = client.request("POST", "nodes", name, "drain", body={"to": to, "dry_run": True})
        if not dry_run and not plan["refused"]:
            with patience(f"Draining {name}"):
                plan = client.request("POST", "nodes", name, "drain", body={"to": to, "dry_run": False})
    if output == "json":
        show_json(plan)
    else:
        # Where it is refused nothing is done, and what would have been is only of interest to who has asked for that.
        for one in plan["demote"] if dry_run or not plan["refused"] else []:
            click.echo(f"{one} {'would be' if dry_run else 'is'} demoted.")
        if not plan["refused"]:
            click.echo(f"Node {name} {'would be' if dry_run and plan['demote'] else 'is'} ready to be taken down.")
    if plan["refused"]:
        unchanged = "" if dry_run else ", and nothing has changed"
        raise click.ClickException(f"{name} can't be taken down{unchanged}: " + "; ".join(plan["refused"]))
