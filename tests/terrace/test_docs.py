"""The pages that operators rely on name every key, command and request that there is, and their defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import click
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from terrace.api import Api
from terrace.cli.root import root
from terrace.config import Config, ExportConfig, PeerConfig, parse_config
from terrace.schema import Section
from terrace.sizes import parse_size
from terrace.unitfiles import TARGETS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def keys_of(page: str) -> dict[str, str]:
    """The default of each key that has a row."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in page.splitlines() if line.startswith("| `")]
    return {row[0]: row[1].strip('"') for row in rows}


def test_the_configuration_page_has_every_key_with_its_default() -> None:
    page = (DOCS / "configuration.md").read_text()
    start, end = page.index("### `[node]`"), page.index('### `[nbd.exports."PATTERN"]`')
    config = Config()
    sections = (
        config.nbd,
        config.nbd.tls,
        ExportConfig(),
        config.pool,
        config.space,
        config.scrub,
        config.fuse,
        config.log,
    )
    nodes: tuple[Section, ...] = (config.node, PeerConfig(address="HOST:10809"))
    for section in (*sections, *nodes):
        documented = keys_of(page[start:end] if section in nodes else page[:start] + page[end:])
        for key, default in section.model_dump().items():
            if isinstance(default, dict):  # a table of its own
                continue
            shown = documented[key]
            if isinstance(default, bool):
                assert shown == str(default).lower()
            elif isinstance(default, list):
                assert shown == str(default).replace("'", '"')
            elif isinstance(default, int | float):
                assert parse_size(shown) == default
            else:
                assert shown == default
    documented = keys_of(page)
    for key, default in Config().show_policy("default").keys.items():
        assert documented[key] == str(default)


def test_the_examples_of_configuration_are_good() -> None:
    page = (DOCS / "configuration.md").read_text()
    rules, policies = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert {"database", "tenant", "archive"} < parse_config(policies, "example").policies().keys()
    assert len(parse_config(rules, "example").nbd.rules()) == 3
    (tls,) = re.findall(r"```toml\n(.*?)```", (DOCS / "nbd.md").read_text(), re.DOTALL)
    assert parse_config(tls, "example").nbd.tls.mode == "required"
    nodes, etcd = re.findall(r"```toml\n(.*?)```", (DOCS / "mirroring.md").read_text(), re.DOTALL)
    assert parse_config(nodes, "example").peers.keys() == {"b"}
    assert len(parse_config(etcd, "example").etcd.endpoints) == 3


def commands(group: click.Group, path: str) -> list[str]:
    found: list[str] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        deeper = f"{path} {name}"
        found += commands(command, deeper) if isinstance(command, click.Group) else [deeper]
    return found


@pytest.mark.parametrize("command", commands(root, "terrace"))
def test_the_command_line_page_has_every_command(command: str) -> None:
    assert command in (DOCS / "cli.md").read_text()


def test_the_operating_page_says_what_to_do_at_every_kind_of_event() -> None:
    """Kinds are literals where events are told."""
    told = re.compile(r"(?:\bevents|\badd|_tell|_events)\(\s*\"([a-z]+)\",")
    kinds = {
        kind
        for package in ("terrace", "tiers")
        for file in (DOCS.parent / package).rglob("*.py")
        for kind in told.findall(file.read_text())
    }
    assert {"space", "pool", "device", "evacuation", "snapshot"} <= kinds
    page = (DOCS / "operating.md").read_text()
    assert {kind for kind in kinds if f"### `{kind}`" not in page} == set()
    for level in Config().space.levels:
        assert f"above {level:g} %" in page


def test_the_operating_page_names_every_file() -> None:
    page = (DOCS / "operating.md").read_text()
    for name in TARGETS:
        assert name.replace("@", "@POOL-VOL") in page


def test_the_command_line_page_has_every_request() -> None:
    page = (DOCS / "cli.md").read_text()
    app = cast(Any, Api(*(cast(Any, None),) * 6).app())._app
    assert isinstance(app, Starlette)
    for route in app.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{pool}", "P").replace("{volume}", "V").replace("{policy}", "N")
        path = path.replace("{snapshot}", "S").replace("{export}", "E").replace("{node:path}", "{node}")
        for method in (route.methods or set()) - {"HEAD"}:
            assert f"`{method} {path}`" in page
