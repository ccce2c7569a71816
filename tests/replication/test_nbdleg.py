"""Legs on NBD servers: the contract of every leg, against real servers, and what such a leg is not."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from replication.leg import BLOCK_BYTES, EXTENT_BYTES
from replication.nbdleg import NbdSite, probe
from tests.nbd.client import serving
from tests.nbd.memory import MemoryExport
from tests.nbd.test_client_tls import make_pki
from tests.replication.leg_contract import LegContract, Rig
from tests.replication.linked import Told, data, run, until, zeros
from tests.replication.nbdservers import KINDS, empty_extents, image_of, opened, server, site, started

SIZE = 4 << 20


@dataclass
class NbdRig(Rig):
    uri: str = ""

    async def image(self) -> bytes:
        """Over a connection of its own, when the leg has flushed: qemu-nbd's connections see each other's then."""
        await self.leg.flush()
        return await image_of(self.uri)


class NbdContract(LegContract):
    kind: str

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Rig]:
        async with server(self.kind, self.directory, SIZE) as there, opened(there.uri, SIZE) as leg:
            yield NbdRig(leg, None, uri=there.uri)


class TestNbdkit(NbdContract):
    kind = "nbdkit"


class TestQemuRaw(NbdContract):
    kind = "qemu-nbd raw"


class TestQemuQcow2(NbdContract):
    kind = "qemu-nbd qcow2"


class TestOurs(NbdContract):
    kind = "ours"


# --- what it does ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_trim_reads_as_zeros_whatever_the_server_makes_of_trims(kind: str, tmp_path: Path) -> None:
    async def body() -> None:
        options = ("--filter=nozero",) if kind == "nbdkit" else ()  # one without WRITE_ZEROES
        async with server(kind, tmp_path, SIZE, *options) as there, opened(there.uri, SIZE) as leg:
            told = Told()
            leg.submit(1, [data(0, 7, SIZE)], told.of(1))
            leg.submit(2, [zeros(EXTENT_BYTES, 2 << 20), zeros(3 << 20, BLOCK_BYTES)], told.of(2))
            await leg.flush()
            image = await image_of(there.uri)
            full = bytes([7]) * SIZE
            assert image[:EXTENT_BYTES] == full[:EXTENT_BYTES]
            assert image[EXTENT_BYTES : EXTENT_BYTES + (2 << 20)] == bytes(2 << 20)
            assert image[3 << 20 : (3 << 20) + BLOCK_BYTES] == bytes(BLOCK_BYTES)
            assert image.count(7) == SIZE - (2 << 20) - BLOCK_BYTES

    run(body)


class Reordering(MemoryExport):
    """Carries writes out in the opposite order of their coming, as far as they are there together."""

    def __init__(self) -> None:
        super().__init__("", size_bytes=SIZE)
        self.waiting: list[trio.Event] = []
        self.most = 0

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        return False

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        mine, kept = trio.Event(), bytes(data)
        self.waiting.append(mine)
        self.most = max(self.most, len(self.waiting))
        await trio.sleep(0.005)
        while self.waiting and self.waiting[-1] is not mine:
            await mine.wait()
            break
        self.waiting.remove(mine)
        if self.waiting:
            self.waiting[-1].set()
        await super().write(offset, kept)


def test_what_overlaps_is_in_order_though_the_server_reorders_and_the_rest_is_under_way_together() -> None:
    async def body() -> None:
        export = Reordering()
        async with serving(export) as served, opened(served.uri(""), SIZE) as leg:
            told = Told()
            for sequence in range(1, 41):
                here = sequence % 10 * 2 * BLOCK_BYTES
                leg.submit(sequence, [data(here, sequence), data(SIZE - 8192, sequence, 8192)], told.of(sequence))
            await leg.flush()
            assert told.done == list(range(1, 41))
            image = await image_of(served.uri(""))
            assert [image[at * 2 * BLOCK_BYTES] for at in range(10)] == [40, *range(31, 40)]
            assert image[-8192:] == bytes([40]) * 8192
            assert export.most > 5

    run(body)


@dataclass
class FakeAhead:
    """The leg of this node."""

    failure: OSError | None = None
    on_applied: list[Callable[[], None]] = field(default_factory=list)
    has: int = 0

    def owes(self, sequence: int) -> bool:
        return self.has < sequence

    def tell(self) -> None:
        for tell in list(self.on_applied):
            tell()


def test_nothing_is_sent_that_the_leg_of_this_node_does_not_have() -> None:
    async def body() -> None:
        export, ahead = MemoryExport("", size_bytes=SIZE), FakeAhead()
        async with serving(export) as served, opened(served.uri(""), SIZE, ahead=ahead) as leg:
            told = Told()
            for sequence in (1, 2, 3):
                leg.submit(sequence, [data(0, sequence)], told.of(sequence))
            await trio.sleep(0.05)
            assert told.calls == [] and export.data[0] == 0 and leg.silent_since is None
            ahead.has = 2
            ahead.tell()
            await until(lambda: told.done == [1, 2])
            assert export.data[0] == 2
            ahead.failure = OSError(errno.EIO, "the disk is gone")
            ahead.tell()
            await until(lambda: told.failed == [3])
            assert leg.failure is not None and leg.failure.errno == errno.EIO and export.data[0] == 2

    run(body)


@pytest.mark.parametrize("waits", ["to be connected", "for the last one to end"])
def test_nothing_is_sent_that_the_leg_of_this_node_does_not_have_though_that_was_opened_meanwhile(waits: str) -> None:
    """When the leg of this node has failed, this one has too, and both are opened anew at the same time."""

    async def body() -> None:
        export, ahead, told = MemoryExport("", size_bytes=SIZE), FakeAhead(), Told()
        async with serving(export) as served, trio.open_nursery() as nursery:
            nbd, legs = site(served.uri("")), []

            async def open_one() -> None:
                legs.append(await nbd.open(nursery, SIZE, timeout_s=5.0, ahead=None))

            if waits != "to be connected":
                await open_one()
                export.slow, export.hold = True, trio.Event()
                legs[0].submit(1, [data(4096, 1)], told.of(1))
                await until(lambda: export.running)
                legs.pop().close()
            nursery.start_soon(open_one)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            assert not legs
            nbd.follow(ahead)
            if export.hold is not None:
                export.hold.set()
            await until(lambda: legs)
            legs[0].submit(2, [data(0, 2)], told.of(2))
            await trio.sleep(0.05)
            assert told.done == [] and export.data[0] == 0
            ahead.has = 2
            ahead.tell()
            await until(lambda: told.done == [2])
            legs[0].close()
            assert ahead.on_applied == []
            nursery.cancel_scope.cancel()

    run(body)


def test_another_leg_of_a_server_begins_only_when_all_that_the_last_one_sent_is_answered(tmp_path: Path) -> None:
    async def body() -> None:
        async with server("nbdkit", tmp_path, SIZE) as there, trio.open_nursery() as nursery:
            assert there.process is not None
            nbd = site(there.uri)
            first, told = await nbd.open(nursery, SIZE, timeout_s=0.2), Told()
            os.kill(there.process.pid, signal.SIGSTOP)
            first.submit(1, [data(0, 1)], told.of(1))
            await trio.sleep(0.05)
            assert first.silent_since is not None
            first.close()
            await until(lambda: told.failed == [1])
            with pytest.raises(OSError, match="has not yet answered") as refused:
                await nbd.open(nursery, SIZE, timeout_s=0.2)
            assert refused.value.errno == errno.EBUSY
            os.kill(there.process.pid, signal.SIGCONT)
            second = await nbd.open(nursery, SIZE, timeout_s=5)
            second.submit(2, [data(0, 2)], told.of(2))
            await second.flush()
            assert (await image_of(there.uri))[0] == 2
            changed = await second.changed(["recent*"])  # what the first one sent nobody else may know of
            assert list(changed.runs()) == [(0, EXTENT_BYTES)]
            nbd.in_sync()
            nursery.cancel_scope.cancel()

    run(body)


class Straits:
    """Connections to a server pass through here. What comes from a client can be held back, and comes late then, though
    its connection has broken meanwhile: as in the sockets of a server that was stopped."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.is_shut = False
        self.held_bytes = 0
        self.late_s = 0.3

    async def carry(self, client: trio.SocketStream) -> None:
        """One connection."""
        server = await trio.open_unix_socket(self.target)
        async with client, server, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def back() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for answer in server:
                        await client.send_all(answer)

            async for part in client:
                if self.is_shut:
                    self.held_bytes = len(part)
                    await client.aclose()
                    await trio.sleep(self.late_s)
                    await server.send_all(part)
                    await trio.sleep(0.1)
                    break
                await server.send_all(part)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_same_process", [True, False])
def test_what_a_server_got_over_a_connection_that_broke_lands_before_another_leg_begins(
    is_same_process: bool, tmp_path: Path
) -> None:
    async def body() -> None:
        async with serving(MemoryExport("", size_bytes=SIZE)) as served, trio.open_nursery() as nursery:
            straits = Straits(str(served.directory / "nbd.sock"))
            listener = trio.SocketListener(await bound(tmp_path / "straits"))
            nursery.start_soon(trio.serve_listeners, straits.carry, [listener])
            nbd, told = site(f"nbd+unix:///?socket={tmp_path / 'straits'}"), Told()
            first = await nbd.open(nursery, SIZE, timeout_s=0.5)
            straits.is_shut = True
            first.submit(1, [data(0, 1)], told.of(1))
            await until(lambda: told.failed == [1])
            straits.is_shut = False
            assert straits.held_bytes > 4096
            if not is_same_process:
                nbd = NbdSite(nbd.info, empty_extents, may_owe=True)
            second = await nbd.open(nursery, SIZE, timeout_s=0.5)
            second.submit(2, [data(0, 2)], told.of(2))
            await second.flush()
            await trio.sleep(0.5)
            assert (await image_of(served.uri("")))[0] == 2
            second.close()
            began = trio.current_time()
            await nbd.open(nursery, SIZE, timeout_s=5.0)
            assert trio.current_time() - began < 2, "all was answered: there is nothing to wait for"
            nursery.cancel_scope.cancel()

    run(body)


async def bound(path: Path) -> trio.socket.SocketType:
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen(8)
    return listening


def test_a_read_of_a_server_that_says_nothing_ends_when_the_leg_is_given_up(tmp_path: Path) -> None:
    async def body() -> None:
        async with server("nbdkit", tmp_path, SIZE) as there, opened(there.uri, SIZE) as leg:
            assert there.process is not None
            os.kill(there.process.pid, signal.SIGSTOP)
            try:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def close() -> None:
                        await until(lambda: leg.silent_since is not None)
                        leg.close()

                    with pytest.raises(OSError, match="closed") as failed:
                        await leg.read(0, 4096, memoryview(bytearray(4096)))
                    assert failed.value.errno == errno.ECANCELED
            finally:
                os.kill(there.process.pid, signal.SIGCONT)

    run(body)


def test_a_server_that_is_killed_fails_the_leg_and_all_that_is_due(tmp_path: Path) -> None:
    async def body() -> None:
        async with server("nbdkit", tmp_path, SIZE) as there, opened(there.uri, SIZE) as leg:
            assert there.process is not None
            there.process.kill()
            told = Told()
            for sequence in range(1, 9):
                leg.submit(sequence, [data(0, sequence, 1 << 20)], told.of(sequence))
            await until(lambda: len(told.calls) == 8)
            assert told.failed == list(range(1, 9)) and leg.failure is not None and leg.queued_bytes == 0
            with pytest.raises(OSError):
                await leg.flush()

    run(body)


def test_a_read_that_fails_at_the_server_fails_neither_the_leg_nor_others(tmp_path: Path) -> None:
    class Bad(MemoryExport):
        def read_now(self, offset: int, length: int, into: memoryview) -> bool:
            if offset < 4096:
                raise OSError(errno.EIO, "a bad block")
            return super().read_now(offset, length, into)

    async def body() -> None:
        async with serving(Bad("", size_bytes=SIZE)) as served, opened(served.uri(""), SIZE) as leg:
            with pytest.raises(OSError) as failed:
                await leg.read(0, 4096, memoryview(bytearray(4096)))
            assert failed.value.errno == errno.EIO and leg.failure is None
            await leg.read(8192, 4096, memoryview(bytearray(4096)))

    run(body)


# --- bad servers ---


@pytest.mark.parametrize(
    ("options", "size_bytes", "number", "said"),
    [
        (["-r"], SIZE, errno.EROFS, "is read-only"),
        ([], SIZE + 4096, errno.ENOSPC, "make the export at least so large"),
        (["--filter=nozero", "eval", "get_size=echo 4194304", "pread=true", "pwrite=true"], SIZE, errno.EOPNOTSUPP,
         "offers no FLUSH"),
        (["--filter=blocksize-policy", "blocksize-minimum=64k", "blocksize-preferred=64k"], SIZE, errno.EINVAL,
         "65536"),
    ],
)  # fmt: skip
def test_a_server_that_can_not_be_a_leg_is_refused_with_a_sentence(
    options: list[str], size_bytes: int, number: int, said: str, tmp_path: Path
) -> None:
    async def body() -> None:
        plugin = [] if "eval" in options else ["memory", str(SIZE)]
        filters = [one for one in options if one.startswith("-")]
        rest = [one for one in options if not one.startswith("-")]
        socket = tmp_path / "s"
        plugin = [*plugin, *rest]
        async with started(socket, "nbdkit", "-f", "-U", str(socket), *filters, *plugin):
            with pytest.raises(OSError, match=said) as error:
                await probe(f"nbd+unix:///?socket={socket}", size_bytes, timeout_s=5.0)
            assert error.value.errno == number

    run(body)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbd://no-such-host.invalid/x", "no-such-host.invalid"),
        ("nbd://127.0.0.1:1/x", "efused"),
        ("nbd+unix:///x?socket=/nonexistent/sock", "No such file"),
    ],
)
def test_a_server_that_is_not_there_is_named(uri: str, said: str) -> None:
    with pytest.raises(OSError, match=said) as error:
        run(lambda: probe(uri, SIZE, timeout_s=2.0))
    assert error.value.errno is not None


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


def test_a_server_that_wants_tls_is_a_leg_over_tls_and_refused_without(tmp_path: Path, pki: Path) -> None:
    async def body() -> None:
        options = ("--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer")
        async with server("nbdkit", tmp_path, SIZE, *options) as there:
            with pytest.raises(OSError, match="TLS") as refused:
                await probe(there.uri, SIZE, timeout_s=5.0)
            assert refused.value.errno is not None
            uri = there.uri.replace("nbd+unix", "nbds+unix") + f"&tls-certificates={pki}&tls-hostname=localhost"
            async with opened(uri, SIZE) as leg:
                told = Told()
                leg.submit(1, [data(4096, 7, 1 << 20)], told.of(1))
                await leg.flush()
                assert told.done == [1]
                assert (await image_of(uri))[4096 : 4096 + (1 << 20)] == bytes([7]) * (1 << 20)

    run(body)


def test_a_server_without_the_export_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(MemoryExport("there", size_bytes=SIZE)) as served:
            with pytest.raises(OSError, match="missing") as refused:
                await probe(served.uri("missing"), SIZE, timeout_s=5.0)
            assert refused.value.errno == errno.ENOENT

    run(body)
