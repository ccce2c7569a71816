"""`EtcdCluster` keeps the contract of a `ClusterStore`, with a real etcd."""

from __future__ import annotations

import base64
import dataclasses
import errno
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from replication.etcd import EtcdCluster, EtcdLease
from replication.etcdclient import Etcd, EtcdLogin, EtcdTls
from replication.membership import Membership, Options, Term, encode
from replication.promotion import Promote, Refused, promote
from terrace.certificates import make_authority, make_node
from tests.etcdserver import EtcdServer, free_port
from tests.replication.cluster_contract import *  # noqa: F403
from tests.replication.cluster_contract import Clusters, World
from tests.replication.nodes import Nodes
from tests.replication.stores import MIRROR, first_record


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    try:
        yield server
    finally:
        server.kill()


OPTIONS = Options(arbiter="etcd")


def etcd_record() -> Membership:
    return first_record("abc", options=OPTIONS)


class EtcdWorld(Nodes):
    def __init__(self, server: EtcdServer, etcd: Etcd) -> None:
        super().__init__("abc", timeout_s=0.3)
        self._server, self.etcd, self.options = server, etcd, OPTIONS
        self.made: dict[str, EtcdCluster] = {}

    def cluster(self, node: str) -> EtcdCluster:  # type: ignore[override]
        return self.made.setdefault(node, EtcdCluster(node, self.etcd, super().cluster(node)))

    def lease(self, node: str) -> EtcdLease:
        return EtcdLease(node, self.etcd, MIRROR, 2.0)

    def cut(self) -> None:
        super().cut()
        self._server.pause()

    def heal(self) -> None:
        super().heal()
        self._server.resume()


@asynccontextmanager
async def etcd_world(server: EtcdServer, *more: str) -> AsyncIterator[EtcdWorld]:
    server.wipe()
    async with Etcd([*more, server.url], timeout_s=1.0) as etcd:
        world = EtcdWorld(server, etcd)
        try:
            yield world
        finally:
            world.heal()


@pytest.fixture
def clusters(server: EtcdServer) -> Clusters:
    @asynccontextmanager
    async def begin() -> AsyncIterator[World]:
        async with etcd_world(server) as world:
            yield world

    return begin


def test_an_endpoint_that_is_dead_is_passed_over(server: EtcdServer) -> None:
    async def main() -> None:
        async with etcd_world(server, f"http://127.0.0.1:{free_port()}") as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            assert await world.cluster("b").newest(MIRROR) == first

    trio.run(main)


def test_a_record_is_in_etcd_and_at_its_legs_before_it_counts(server: EtcdServer) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            second = first.next_epoch(in_sync=frozenset("ab"))
            world.all["b"].up = False
            with pytest.raises(OSError, match="isn't stored") as refused:
                await world.cluster("a").commit(second, expected=first)
            assert refused.value.errno == errno.ETIMEDOUT
            assert await world.cluster("c").newest(MIRROR) == second  # a candidate finds it
            third = second.next_epoch(in_sync=frozenset("a"))
            await world.cluster("a").commit(third, expected=second)
            assert world.all["a"].keeper.record.accepted == third

    trio.run(main)


def test_no_new_term_begins_while_another_node_holds_the_primarys_lease(server: EtcdServer) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            a, b = world.cluster("a"), world.cluster("b")
            await a.create(first)
            lease = world.lease("a")
            await lease.renew(first)
            await lease.renew(first)
            with pytest.raises(OSError, match="another node is primary") as refused:
                await world.lease("b").renew(first)
            assert refused.value.errno == errno.EBUSY
            new = first.next_term(Term(2, "2" * 16), "b", frozenset("abc"))
            with pytest.raises(OSError, match="node a is primary and alive") as refused:
                await b.commit(new, expected=first)
            assert refused.value.errno == errno.EBUSY
            await lease.release()
            await b.commit(new, expected=first)
            await world.lease("b").renew(new)
            # A primary that is started again isn't kept out by itself, and takes its own key over.
            again = new.next_term(Term(3, "3" * 16), "b", frozenset("abc"))
            await b.commit(again, expected=new)
            await world.lease("b").renew(again)

    trio.run(main)


def test_a_lease_is_renewed_only_while_the_record_is_of_its_term(server: EtcdServer) -> None:
    """Whoever was made primary by force didn't wait for its end."""

    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            lease = world.lease("a")
            await lease.renew(first)
            second = first.next_epoch(in_sync=frozenset("ab"))
            await world.cluster("a").commit(second, expected=first)
            await lease.renew(first)  # which began before that was known to count
            forced = second.next_term(Term(2, "2" * 16), "b", frozenset("b"), "fenced")
            await world.cluster("b").commit(forced, expected=second)
            with pytest.raises(OSError, match=r"node b is primary by the record 2\.0 in etcd") as refused:
                await lease.renew(second)
            assert refused.value.errno == errno.ESTALE

    trio.run(main)


def test_a_lease_that_has_expired_is_taken_anew_or_lost(server: EtcdServer) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            a, b = world.lease("a"), world.lease("b")
            for others in (False, True):
                await a.renew(first)
                assert a._lease is not None
                await world.etcd.call("lease/revoke", {"ID": a._lease})  # as an expiry, without the wait
                if others:
                    await b.renew(first)
                    with pytest.raises(OSError, match="another node is primary"):
                        await a.renew(first)

    trio.run(main)


def test_a_primary_writes_over_its_own_record_of_which_it_does_not_know_whether_it_counts(server: EtcdServer) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            second = first.next_epoch(in_sync=frozenset("ab"))
            world.all["b"].up = False
            with pytest.raises(OSError, match="isn't stored"):
                await world.cluster("a").commit(second, expected=first)
            third = dataclasses.replace(first, epoch=second.epoch).next_epoch(in_sync=frozenset("ac"))
            await world.cluster("a").commit(third, expected=first)
            assert await world.cluster("c").newest(MIRROR) == third

    trio.run(main)


def test_a_record_that_a_leg_refuses_for_a_promise_is_in_doubt_and_not_lost(server: EtcdServer) -> None:
    """It is in etcd, so whoever was promised has to begin anew; who wrote it must not take it for counting."""

    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            await world.all["b"].keeper.prepare(Term(2, "2" * 16), "b")
            second = first.next_epoch(in_sync=frozenset("ab"))
            with pytest.raises(OSError, match="promised term 2") as refused:
                await world.cluster("a").commit(second, expected=first)
            assert refused.value.errno == errno.ETIMEDOUT
            with pytest.raises(OSError, match="others went on") as refused:
                late = first.next_term(Term(2, "2" * 16), "b", frozenset("bc"))
                await world.cluster("b").commit(late, expected=first)
            assert refused.value.errno == errno.ESTALE

    trio.run(main)


@pytest.mark.parametrize("lost", ["all of it", "the newest"])
def test_etcd_that_has_forgotten_is_told_and_written_over_only_by_force(server: EtcdServer, lost: str) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            a = world.cluster("a")
            await a.create(first)
            second = first.next_epoch(in_sync=frozenset("ab"))
            await a.commit(second, expected=first)
            server.wipe()
            if lost == "the newest":
                await world.etcd.call("kv/put", {"key": membership_key(), "value": value_of(encode(first))})
            has = "no record of this mirror" if lost == "all of it" else r"the record 1\.0"
            told = rf"etcd has {has}, and node a has 1\.1.* restored from an older backup"
            with pytest.raises(OSError, match=told) as refused:
                await a.commit(second.next_epoch(in_sync=frozenset("a")), expected=second)
            assert refused.value.errno == errno.EUCLEAN
            with pytest.raises(OSError, match=told) as refused:
                await world.lease("a").renew(second)
            assert refused.value.errno == errno.EUCLEAN
            voter = world.voter("b")
            found = await promote("b", MIRROR, "abc", voter, world.cluster("b"), arbiter=True, timeout_s=0.3)
            assert isinstance(found, Refused)
            assert re.search(rf"etcd has {has}, and node [ab] has 1\.1", found.sentence)
            assert world.all["a"].keeper.record.promised == first.term  # nobody was fenced for that
            forced = await promote("b", MIRROR, "abc", voter, world.cluster("b"), arbiter=True, force=True, timeout_s=1)
            assert isinstance(forced, Promote)
            assert await a.newest(MIRROR) == forced.membership

    trio.run(main)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"hello", "can't be understood"),
        (b"\xff\xfe", "can't be understood"),
        (encode(dataclasses.replace(etcd_record(), mirror="cd" * 16)), "of another mirror"),
    ],
)
def test_a_key_with_what_is_no_record_is_named_and_left_as_it_is(server: EtcdServer, value: bytes, said: str) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            await world.etcd.call("kv/put", {"key": membership_key(), "value": value_of(value)})
            first = etcd_record()
            for attempt in (
                lambda: world.cluster("a").newest(MIRROR),
                lambda: world.cluster("a").create(first),
                lambda: world.cluster("a").commit(first.next_epoch(), expected=first),
                lambda: world.lease("a").renew(first),
            ):
                with pytest.raises(OSError, match=f"terrace/mirrors/{MIRROR}/membership .*{said}") as refused:
                    await attempt()
                assert refused.value.errno == errno.EPROTO
            (key,) = server.stored()
            assert base64.b64decode(key["value"]) == value

    trio.run(main)


def test_a_mirror_that_is_gone_leaves_no_keys_and_takes_no_others_with_it(server: EtcdServer) -> None:
    async def main() -> None:
        async with etcd_world(server) as world:
            first = etcd_record()
            await world.cluster("a").create(first)
            other = dataclasses.replace(first, mirror="cd" * 16)
            other = dataclasses.replace(other, history=(other.generation,))
            assert await world.cluster("a")._swap(other, 0) is None
            await world.lease("a").renew(first)
            await world.cluster("a").forget(MIRROR)
            assert [base64.b64decode(key["key"]) for key in server.stored()] == [
                b"terrace/mirrors/" + b"cd" * 16 + b"/membership"
            ]

    trio.run(main)


def membership_key() -> str:
    return value_of(f"terrace/mirrors/{MIRROR}/membership".encode())


def value_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "endpoints", [[], ["ftp://host:1"], ["host:2379"], ["http://"], ["https://h:1/x"], ["https://"]]
)
def test_an_endpoint_that_makes_no_sense_is_named(endpoints: list[str]) -> None:
    with pytest.raises(OSError, match="endpoint") as refused:
        Etcd(endpoints)
    assert refused.value.errno == errno.EINVAL


def test_what_answers_but_is_no_etcd_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async def other(stream: trio.SocketStream) -> None:
            await stream.receive_some(4096)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, other, 0)
            port = listeners[0].socket.getsockname()[1]
            async with Etcd([f"http://127.0.0.1:{port}"], timeout_s=1) as etcd:
                with pytest.raises(OSError, match="answers as etcd doesn't") as refused:
                    await etcd.call("kv/range", {"key": "AA=="})
                assert refused.value.errno == errno.EPROTO
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_call_whose_client_is_given_up_by_another_call_says_that_etcd_is_silent() -> None:
    async def main() -> None:
        async def silent(stream: trio.SocketStream) -> None:
            await trio.sleep_forever()

        async def refused(etcd: Etcd, after_s: float) -> None:
            await trio.sleep(after_s)
            with pytest.raises(OSError, match=r"has not answered within 1 s \(http://127\.0\.0\.1:\d+: silent\)"):
                await etcd.call("kv/range", {"key": "AA=="})
            ended.append(after_s)

        ended: list[float] = []
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, silent, 0)
            port = listeners[0].socket.getsockname()[1]
            async with Etcd([f"http://127.0.0.1:{port}"], timeout_s=1) as etcd, trio.open_nursery() as calls:
                # The first gives the client up while the second waits for an answer, for the last time.
                for after_s in (0.0, 0.15):
                    calls.start_soon(refused, etcd, after_s)
            nursery.cancel_scope.cancel()
        assert ended == [0.0, 0.15]

    trio.run(main)


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "ca.pem"
    bad.write_text("no certificate")
    with pytest.raises(OSError, match=r"ca\.pem") as refused:
        EtcdTls(ca=bad).context()
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(OSError, match=r"none\.pem, which \[etcd\] names, can't be read") as refused:
        EtcdTls(ca=tmp_path / "none.pem").context()
    assert refused.value.errno == errno.EINVAL


def test_etcd_over_tls_wants_the_right_authority_and_a_certificate_of_ours(tmp_path: Path) -> None:
    for name in ("authority", "stranger"):
        make_authority(tmp_path / name, name, 2)
    files = make_node(tmp_path / "authority", "e", ["127.0.0.1"], 2, here=False)
    stranger = make_node(tmp_path / "stranger", "s", ["127.0.0.1"], 2, here=False)
    server = EtcdServer(tmp_path / "server", tls=files)

    async def main() -> None:
        ca, certificate, key = (files / f"{name}.pem" for name in ("ca-cert", "node-cert", "node-key"))
        async with Etcd([server.url], tls=EtcdTls(ca, certificate, key)) as etcd:
            assert "header" in await etcd.call("kv/range", {"key": "AA=="})
        for tls, said in (
            (None, "unable to get local issuer"),
            (EtcdTls(stranger / "ca-cert.pem", certificate, key), "TLS: .*certificate"),
            (EtcdTls(ca, stranger / "node-cert.pem", stranger / "node-key.pem"), "certificate|closed|Error|TLS"),
        ):
            async with Etcd([server.url], tls=tls, timeout_s=0.5) as etcd:
                with pytest.raises(OSError, match=said) as refused:
                    await etcd.call("kv/range", {"key": "AA=="})
                assert refused.value.errno == errno.ETIMEDOUT and server.url in str(refused.value.strerror)
        # The right files come to their place, and nothing is started anew.
        for name in ("ca-cert", "node-cert", "node-key"):
            (tmp_path / f"{name}.pem").write_bytes((stranger / f"{name}.pem").read_bytes())
        (tmp_path / "node-key.pem").chmod(0o600)
        mine = EtcdTls(*(tmp_path / f"{name}.pem" for name in ("ca-cert", "node-cert", "node-key")))
        async with Etcd([server.url], tls=mine, timeout_s=0.5) as etcd:
            with pytest.raises(OSError, match="certificate"):
                await etcd.call("kv/range", {"key": "AA=="})
            for name in ("ca-cert", "node-cert", "node-key"):
                (tmp_path / f"{name}.pem").write_bytes((files / f"{name}.pem").read_bytes())
            assert "header" in await etcd.call("kv/range", {"key": "AA=="})

    try:
        trio.run(main)
    finally:
        server.kill()


def test_a_user_is_let_in_by_its_password_and_gets_what_it_may(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "server")
    for user, role in (("root", "root"), ("t", "mirrors"), ("other", "")):
        server.ask("auth/user/add", {"name": user, "password": f"secret of {user}"})
        if role:
            server.ask("auth/role/add", {"name": role})
            server.ask("auth/user/grant", {"user": user, "role": role})
    keys = {"key": value_of(b"terrace/"), "range_end": value_of(b"terrace0"), "permType": "READWRITE"}
    server.ask("auth/role/grant", {"name": "mirrors", "perm": keys})
    server.ask("auth/enable", {})
    secret = tmp_path / "secret"

    async def main() -> None:
        async def told(login: EtcdLogin | None) -> str:
            async with Etcd([server.url], login=login, timeout_s=1) as etcd:
                with pytest.raises(OSError, match="etcd") as refused:
                    await etcd.call("kv/range", {"key": membership_key()})
                assert refused.value.errno == errno.EACCES
                return str(refused.value.strerror)

        secret.write_text("wrong")
        secret.chmod(0o644)
        async with Etcd([server.url], login=EtcdLogin("t", secret)) as etcd:
            with pytest.raises(OSError, match=r"secret, which \[etcd\] names, can be read by everybody: chmod o="):
                await etcd.call("kv/range", {"key": membership_key()})
        secret.chmod(0o600)
        said = await told(EtcdLogin("t", secret))
        assert "doesn't let in the user t" in said and "wrong" not in said and "[etcd]" in said
        assert "who has no name" in await told(None)
        secret.write_text("secret of other\n")
        assert "the user other no right to its keys" in await told(EtcdLogin("other", secret))
        with pytest.raises(OSError, match=r"none, which \[etcd\] names, can't be read"):
            async with Etcd([server.url], login=EtcdLogin("t", tmp_path / "none")) as etcd:
                await etcd.call("kv/range", {"key": membership_key()})
        secret.write_text("secret of t\n")
        async with Etcd([server.url], login=EtcdLogin("t", secret)) as etcd:
            world = EtcdWorld(server, etcd)
            first = etcd_record()
            await world.cluster("a").create(first)
            await world.lease("a").renew(first)
            etcd._token = "expired.1"
            assert await world.cluster("b").newest(MIRROR) == first
            await world.cluster("a").forget(MIRROR)

    try:
        trio.run(main)
    finally:
        server.kill()


def test_etcd_whose_quota_is_used_up_says_so_and_the_lease_of_a_primary_goes_on(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "server", options=["--quota-backend-bytes=1048576"])

    async def main() -> None:
        async with Etcd([server.url], timeout_s=2) as etcd:
            world = EtcdWorld(server, etcd)
            first = etcd_record()
            await world.cluster("a").create(first)
            lease = world.lease("a")
            await lease.renew(first)
            with pytest.raises(OSError, match="used up its quota") as refused:
                for number in range(400):
                    await trio.sleep(0.01)  # it looks at its size when it commits, ten times a second
                    await etcd.call("kv/put", {"key": value_of(b"%d" % number), "value": value_of(bytes(100_000))})
            assert refused.value.errno == errno.ENOSPC
            with pytest.raises(OSError, match=r"used up its quota .* alarm disarm"):
                await world.cluster("a").commit(first.next_epoch(in_sync=frozenset("ab")), expected=first)
            await lease.renew(first)

    try:
        trio.run(main)
    finally:
        server.kill()
