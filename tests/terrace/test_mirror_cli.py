"""What people read of mirrors, from what the control API says of them."""

from __future__ import annotations

from typing import Any

import pytest

from terrace.cli.status import show_status_of_mirrors

URI = "nbd+unix:///e?socket=/run/leg.sock"


def leg(node: str, state: str, *, uri: str | None = None, **more: Any) -> dict[str, Any]:
    """As in `GET /v1/mirrors`."""
    found: dict[str, Any] = {
        "id": f"{node}{uri or ''}",
        "node": node,
        "export": uri or "p/v",
        "pool": "-" if uri else "p",
        "kind": "nbd" if uri else "terrace",
        "state": state,
        "queued_bytes": 0,
        "healed_blocks": 0,
    }
    return dict.fromkeys(("for_s", "to_sync_bytes", "bytes_per_s", "eta_s", "error")) | found | more


def mirror(*legs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As in `GET /v1/mirrors`, of a node a that serves it."""
    found: dict[str, Any] = {
        "volume": "p/v",
        "node": "a",
        "size_bytes": 1 << 25,
        "diskless": False,
        "mirror": "0" * 32,
        "role": "primary",
        "primary": "a",
        "term": 1,
        "epoch": 3,
        "token": None,
        "voters": ["a"],
        "arbiter": {"kind": "legs", "answers": None, "problem": None},
        "state": "Online",
        "waiting": None,
        "problem": None,
        "legs": list(legs),
    }
    return found | more


def test_the_status_names_a_leg_on_an_nbd_server_by_its_uri(capsys: pytest.CaptureFixture[str]) -> None:
    show_status_of_mirrors([mirror(leg("a", "UpToDate"), leg("a", "Stale", uri=URI), state="Degraded")])
    assert f"a UpToDate, {URI} Stale" in capsys.readouterr().out
