"""Nodes find each other over the NBD listener, and take nobody for another."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import nbd.server
from nbd.export import Client
from nbd.listen import open_tcp
from nbd.tls import Identity
from nbd.wire import OPT_TERRACE
from replication.membership import Term
from replication.wire import CallsOption, LegOption
from terrace.certificates import make_authority, make_node
from terrace.config import Config, parse_config
from terrace.exports import PoolExports
from terrace.peers import NodeTakeover, Peers, PeerState, Socket, _about_certificates, home_id


class NoPools:
    def open_pools(self) -> list[Any]:
        return []

    def open_volumes(self) -> list[Any]:
        return []


class NoLegs:
    def judge(self, option: LegOption) -> str | None:
        return f"there is no leg {option.leg}"

    async def serve(self, sock: Socket, received: bytes, option: LegOption) -> None:
        raise AssertionError("it was refused")


def config_of(name: str, **peers: int) -> Config:
    text = f'[node]\nname = "{name}"\n'
    for peer, port in peers.items():
        text += f'[peers.{peer}]\naddress = "127.0.0.1:{port}"\nplaintext = true\n'
    return parse_config(text, "test")


def peers_of(home: Path, config: Config, told: list[str] | None = None) -> Peers:
    home.mkdir(exist_ok=True)
    events = told if told is not None else []
    return Peers(config, home, "1.0", lambda: ["p"], lambda kind, subject, text: events.append(text))


@asynccontextmanager
async def serving(peers: Peers) -> AsyncIterator[int]:
    """The node of `peers` on a port of its own, answering hellos."""

    async def hello(node: str, params: dict[str, Any]) -> Any:
        return peers.hello()

    listeners = await open_tcp("127.0.0.1", 0)
    takeover = NodeTakeover(peers, {"node.hello": hello}, NoLegs())
    async with trio.open_nursery() as nursery:
        exports: Any = PoolExports(NoPools())  # type: ignore[arg-type]
        await nursery.start(partial(nbd.server.serve, exports, listeners, takeovers={OPT_TERRACE: takeover}))
        yield int(listeners[0].sock.getsockname()[1])
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


def test_a_peer_that_answers_is_online_and_one_that_has_gone_offline_with_the_reason(tmp_path: Path) -> None:
    told: list[str] = []

    async def main() -> None:
        b = peers_of(tmp_path / "b", config_of("b", a=1))
        async with serving(b) as port:
            a = peers_of(tmp_path / "a", config_of("a", b=port), told)
            peer = a.peers["b"]
            with pytest.raises(OSError, match="can't be reached"):
                await a.call("b", "node.hello", {})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.run)
                await until(lambda: peer.state is PeerState.ONLINE)
                assert (await a.call("b", "node.hello", {}))["node"] == "b"
                shown = a.status()[1]
                assert (shown["pools"], shown["version"], shown["problem"]) == (["p"], "1.0", "")
                assert shown["home_id"] == home_id(tmp_path / "b")
                nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.run)
            await until(lambda: peer.state is PeerState.OFFLINE)
            nursery.cancel_scope.cancel()
        assert peer.calls is None
        assert peer.problem == f"127.0.0.1:{port}: Connection refused"
        assert a.status()[1]["problem"] == (
            f"127.0.0.1:{port}: Connection refused; start terraced there, or correct the address under [peers.b]"
        )
        with pytest.raises(OSError, match=f"node b can't be reached: 127.0.0.1:{port}: Connection refused$"):
            await a.call("b", "node.hello", {})

    trio.run(main)
    assert told[0].startswith("node b is online") and "node b is offline" in told[-1]


def test_a_peer_that_falls_silent_is_offline_with_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terrace.peers.HELLO_S", 0.05)
    told: list[str] = []

    async def main() -> None:
        b = peers_of(tmp_path / "b", config_of("b", a=1))
        async with serving(b) as port, trio.open_nursery() as nursery:
            a = peers_of(tmp_path / "a", config_of("a", b=port), told)
            nursery.start_soon(a.run)
            await until(lambda: a.peers["b"].state is PeerState.ONLINE)
            calls = a.peers["b"].calls
            assert calls is not None
            calls._fail(OSError(errno.ETIMEDOUT, "node b has been silent for 5 s"))
            await until(lambda: len(told) > 1)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert told[1] == "node b is offline: node b has been silent for 5 s"


@pytest.mark.parametrize(
    ("name", "knows", "same_home", "said"),
    [
        ("c", "a", False, "is the node 'c', not 'b'"),
        ("b", "z", False, "node 'a' is no peer of 'b'"),
        ("b", "a", True, "is this node itself"),
    ],
)
def test_who_is_somebody_else_is_refused(tmp_path: Path, name: str, knows: str, same_home: bool, said: str) -> None:
    async def main() -> None:
        other = peers_of(tmp_path / ("a" if same_home else "b"), config_of(name, **{knows: 1}))
        async with serving(other) as port:
            a = peers_of(tmp_path / "a", config_of("a", b=port))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.run)
                await until(lambda: a.peers["b"].state is PeerState.REFUSED)
                assert said in a.peers["b"].problem
                nursery.cancel_scope.cancel()

    trio.run(main)


TLS = '[nbd.tls]\nmode = "required"\n[node]\nname = "a"\n[peers.b]\naddress = "192.0.2.2:1"\n'
CALLS = CallsOption("b").encode()


@pytest.mark.parametrize(
    ("client", "data", "said"),
    [
        (Client("x", "192.0.2.9", True, Identity("CN=b,O=X")), CALLS, None),
        (Client("x", "192.0.2.9", True, Identity("CN=bb")), CALLS, "its certificate is of CN=bb"),
        (Client("x", "192.0.2.9", True, Identity("O=X", ("DNS:b",))), CALLS, "its certificate is of O=X"),
        (Client("x", "192.0.2.9", True, Identity("CN=x\\,CN=b")), CALLS, "its certificate is of"),
        (Client("x", "192.0.2.9", True), CALLS, "showed no certificate"),
        (Client("x", "127.0.0.1"), CALLS, "over TLS only"),
        (Client("x"), CALLS, "over TLS only"),
        (Client("x", "192.0.2.9", True, Identity("CN=c")), CallsOption("c").encode(), "is no peer of 'a'"),
        (Client("x", "192.0.2.9", True, Identity("CN=b")), b"\xff", "can't be understood"),
        (Client("x", "192.0.2.9", True, Identity("CN=b")), b"[]", "can't be understood"),
        (
            Client("x", "192.0.2.9", True, Identity("CN=b")),
            json.dumps({"version": 9, "node": "b", "kind": "calls"}).encode(),
            "version 9",
        ),
        (
            Client("x", "192.0.2.9", True, Identity("CN=b")),
            LegOption("b", "m" * 32, "1" * 16, Term(1, "t"), "s").encode(),
            "there is no leg 1111",
        ),
    ],
)
def test_only_who_has_a_peers_certificate_gets_a_connection(
    tmp_path: Path, client: Client, data: bytes, said: str | None
) -> None:
    takeover = NodeTakeover(peers_of(tmp_path, parse_config(TLS, "test")), {}, NoLegs())
    found = takeover.judge(client, data)
    assert found is None if said is None else found is not None and said in found


def test_a_home_keeps_its_id(tmp_path: Path) -> None:
    first = home_id(tmp_path)
    assert len(first) == 32 and home_id(tmp_path) == first
    (tmp_path / "node-id").write_text("rubbish")
    assert home_id(tmp_path) != first


def _with_certificate(home: Path, authority: Path, name: str) -> None:
    made = make_node(authority, name, [], 30, here=False)
    (home / "tls").mkdir(parents=True)
    for file in made.iterdir():
        file.rename(home / "tls" / file.name)


def test_a_peer_of_another_authority_is_refused_with_the_file_of_ours_and_what_to_do(tmp_path: Path) -> None:
    for name in "ab":
        make_authority(tmp_path / f"of-{name}", f"of {name}", 30)
        _with_certificate(tmp_path / name, tmp_path / f"of-{name}", name)
    told: list[str] = []

    def config(name: str, peer: str, port: int) -> Config:
        text = '[nbd]\nlisten = []\ntls.mode = "required"\n[node]\nname = "{}"\n[peers.{}]\naddress = "127.0.0.1:{}"\n'
        return parse_config(text.format(name, peer, port), "test")

    async def main() -> None:
        ours = config("b", "a", 1)
        takeover = NodeTakeover(peers_of(tmp_path / "b", ours), {}, NoLegs())
        listeners = await open_tcp("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            serve = partial(
                nbd.server.serve, PoolExports(NoPools()), listeners, takeovers={OPT_TERRACE: takeover},  # type: ignore[arg-type]
                tls=ours.tls_files(tmp_path / "b"), tls_required=True,
            )  # fmt: skip
            await nursery.start(serve)
            a = peers_of(tmp_path / "a", config("a", "b", int(listeners[0].sock.getsockname()[1])), told)
            nursery.start_soon(a.run)
            await until(lambda: a.peers["b"].state is PeerState.REFUSED)
            nursery.cancel_scope.cancel()

    trio.run(main)
    (said,) = told
    assert f"that of node b was not signed by the authority in {tmp_path}/a/tls/ca-cert.pem" in said
    assert "with `terrace tls node NAME`" in said


@pytest.mark.parametrize(
    ("number", "said", "step"),
    [
        (
            errno.EPROTO,
            "h:1: the peer refused: unknown ca",
            "node b goes by has not signed the certificate of",
        ),
        (
            errno.EKEYREJECTED,
            "not accepted: unable to get local issuer certificate",
            "the authority in /h/ca.pem: all nodes",
        ),
        (
            errno.EKEYEXPIRED,
            "not accepted: certificate has expired",
            "make another for node b with `terrace tls node b`",
        ),
        (errno.EKEYREJECTED, "not accepted: unsupported certificate purpose", "make another for node b"),
        (errno.EPROTO, "peer refused: certificate expired", "that of this node has expired: make another with"),
    ],
)
def test_each_way_in_which_a_certificate_is_not_accepted_has_its_next_step(number: int, said: str, step: str) -> None:
    assert step in _about_certificates(OSError(number, said), "b", Path("/h/ca.pem"))


def test_what_has_to_do_with_no_certificate_has_no_step_about_one() -> None:
    assert _about_certificates(OSError(errno.ECONNREFUSED, "Connection refused"), "b", Path("/h/ca.pem")) == ""
