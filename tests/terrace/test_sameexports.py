"""Which URIs are one export: by what hosts resolve to and which file a socket is, else by what is written."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import trio

from terrace import sameexports
from terrace.sameexports import SameExports, addresses_of

HOSTS = {
    "nas": ["192.0.2.7", "2001:db8::7"],
    "nas.example": ["2001:db8:0::7"],
    "nas-old": ["192.0.2.8"],
    "localhost": ["::1", "127.0.0.1"],
    "mapped": ["::ffff:192.0.2.7"],
    "127.1": ["127.0.0.1"],
}


def _known(host: str) -> list[str]:
    if host not in HOSTS:
        raise OSError(f"{host} is not known")
    return HOSTS[host]


def are_same(one: str, other: str, addresses: Callable[[str], Iterable[str]] = _known) -> bool:
    return trio.run(SameExports(addresses).same, one, {"other": other}) == "other"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nbd://127.0.0.1:10951/", "nbd://localhost:10951/"),
        ("nbd://[::1]/db", "nbd://localhost/db"),
        ("nbd://[::1]/db", "nbd://127.0.0.1/db"),
        ("nbd://0.0.0.0/db", "nbd://localhost/db"),
        ("nbd://[::]/db", "nbd://127.1/db"),
        ("nbd://[::ffff:127.0.0.1]/db", "nbd://localhost:10809/db"),
        ("nbd://nas/db", "nbds://192.0.2.7:10809/db?tls-verify-peer=0"),
        ("nbd://nas/db", "nbd://nas.example/db"),
        ("nbd://mapped/db", "nbd://nas/db"),
        ("nbd://NAS/db", "nbd://n%41s/db"),
        ("nbd://[2001:DB8:0:0::7]/db", "nbd://nas/db"),
        ("nbd://unknown/db", "nbd://UNKNOWN.:10809/db"),
    ],
)
def test_one_export_is_known_again_however_its_host_is_written(one: str, other: str) -> None:
    assert are_same(one, other) and are_same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nbd://nas/db", "nbd://nas-old/db"),
        ("nbd://nas/db", "nbd://nas:10810/db"),
        ("nbd://nas/db", "nbd://nas/DB"),
        ("nbd://unknown/db", "nbd://other/db"),
        ("nbd://127.0.0.1/db", "nbd://127.0.0.2/db"),
        ("nbd+unix:///db?socket=/nowhere/a", "nbd+unix:///db?socket=/nowhere/b"),
    ],
)
def test_others_are_told_apart(one: str, other: str) -> None:
    assert not are_same(one, other)


def test_a_socket_is_known_by_links_to_it_and_to_its_directory(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "d/s"))
        (tmp_path / "soft").symlink_to("d/s")
        (tmp_path / "e").symlink_to("d")
        os.link(tmp_path / "d/s", tmp_path / "hard")
        for other in ("soft", "e/s", "hard", "d/../d/s", os.path.relpath(tmp_path / "d/s")):
            path = other if other.startswith("..") else f"{tmp_path}/{other}"
            assert are_same(f"nbd+unix:///db?socket={tmp_path}/d/s", f"nbd+unix:///db?socket={path}")
    # Its server is down, and its name is all there is.
    (tmp_path / "d/s").unlink()
    assert are_same(f"nbd+unix:///db?socket={tmp_path}/d/s", f"nbd+unix:///db?socket={tmp_path}/e/s")


def test_a_resolver_that_does_not_answer_is_waited_for_no_longer_than_that_and_names_are_compared_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sameexports, "LOOKUP_S", 0.2)
    answered = threading.Event()

    def slow(host: str) -> list[str]:
        if host == "dead":
            answered.wait(30)
        return _known(host)

    async def main() -> None:
        with trio.fail_after(5):
            same = SameExports(slow)
            names = {name: f"nbd://{name}/db" for name in ("other", "dead", "nas.example")}
            assert await same.same("nbd://dead:10809/db", names) == "dead"
            assert await same.same("nbd://nas/db", names) == "nas.example"

    try:
        trio.run(main)
    finally:
        answered.set()


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "..", "a\0b"])
def test_a_host_or_path_that_the_system_does_not_take_is_compared_as_it_is_written(host: str) -> None:
    name = host.replace("\0", "%00")
    assert are_same(f"nbd://{name}/db", f"nbd://{name}:10809/db", addresses_of)
    assert not are_same(f"nbd://{name}/db", "nbd://127.0.0.1/db", addresses_of)
    assert are_same(f"nbd+unix:///db?socket=/{name}", f"nbd+unix:///db?socket=/./{name}")


def test_the_systems_resolver_knows_localhost() -> None:
    assert {"127.0.0.1", "::1"} & set(addresses_of("localhost"))
