"""The bench's section about NBD itself: what clients cost that do nothing, or worse, and BLOCK_STATUS over terabytes.

What is asked for over the wire here goes through our own client; what the engine alone takes to answer, in volumes with
more in them, is measured without sockets by `bench_extents`.
"""

from __future__ import annotations

import resource
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import trio
from bench_extents import extents
from bench_fio import fio
from bench_sections import GIB, MIB, TIB, Result, running
from bench_servers import Terrace

from nbd import wire
from nbd.client import connect
from tests.system import nbdclient

SECTION = "NBD"
IDLE_CLIENTS = 1000
IDLE_TARGET_MIB = 100.0
IDLE_S = 5.0
STATUS_TARGET_MS = 50.0
GREEDY_READS = 400
"""Of 1 MiB each; a client may have 64 MiB under way."""
GREEDY_TARGET_MIB = 80.0
NEIGHBOUR_TARGET = 0.8
"""Of its rate alone; measured once each, so a part of it is noise."""


def protocol(directory: Path, seconds: float) -> list[Result]:
    """All lines; about a minute."""
    config = f"max_connections = {IDLE_CLIENTS + 100}\nmax_connections_per_address = {IDLE_CLIENTS + 100}\n"
    with running(Terrace(directory / "nbd", GIB, 2 * GIB, config)) as server:
        results = [*_idle(server), *_greedy(server, seconds), *trio.run(_status, server)]
    return results + extents(directory)


def _idle(server: Terrace) -> list[Result]:
    """Clients that are attached and silent, over TCP and the Unix socket, half each."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    before = server.process().memory_info().rss
    with ExitStack() as clients:
        start_s = time.perf_counter()
        for number in range(IDLE_CLIENTS):
            address = ("127.0.0.1", server.daemon.port) if number % 2 else server.daemon.socket
            clients.enter_context(nbdclient.Connection(address, "bench/volume"))
        took_s = time.perf_counter() - start_s
        time.sleep(0.5)
        more = (server.process().memory_info().rss - before) / MIB
        start = server.process().cpu_times()
        time.sleep(IDLE_S)
        end = server.process().cpu_times()
        cpu = (end.user + end.system - start.user - start.system) / IDLE_S * 100
    return [
        Result(SECTION, f"memory of {IDLE_CLIENTS} idle clients", more, "MiB", IDLE_TARGET_MIB),
        Result(SECTION, f"{IDLE_CLIENTS} clients attach, one after the other", took_s, "s"),
        Result(SECTION, f"CPU with {IDLE_CLIENTS} idle clients", cpu, "%", 1.0),
    ]


def _greedy(server: Terrace, seconds: float) -> list[Result]:
    """A client that asks for hundreds of MiB and reads nothing of it, beside one that works."""
    fio(server.uri(), "--rw=write", "--bs=1M", "--iodepth=4")
    options = ("--rw=randread", "--bs=4k", "--iodepth=32", "--time_based", f"--runtime={seconds * 1000:.0f}ms")
    fio(server.uri(), *options)
    alone = fio(server.uri(), *options).iops
    before = server.process().memory_info().rss
    with nbdclient.Connection(server.daemon.socket, "bench/volume") as greedy:
        greedy.socket.sendall(
            b"".join(greedy.encode(nbdclient.READ, number * MIB, MIB)[1] for number in range(GREEDY_READS))
        )
        beside = fio(server.uri(), *options).iops
        more = (server.process().memory_info().rss - before) / MIB
    what = f"a client that asks for {GREEDY_READS} MiB and doesn't read"
    return [
        Result(SECTION, f"{what}: memory", more, "MiB", GREEDY_TARGET_MIB),
        Result(SECTION, f"{what}: 4k reads of its neighbour to alone", beside / alone, "x", least=NEIGHBOUR_TARGET),
    ]


async def _status(server: Terrace) -> list[Result]:
    """All of an empty volume of 10 TiB, by requests of whatever length the headers allow."""
    await trio.to_thread.run_sync(
        partial(server.daemon.api, "POST", "/v1/pools/bench/volumes", {"name": "huge", "size": 10 * TIB})
    )
    address = f"nbd+unix:///bench/huge?socket={server.daemon.socket}"
    results = []
    async with connect(address, contexts=[wire.META_ALLOCATION, "terrace:tier"]) as client:
        if not client.terms.extended:
            raise RuntimeError("the server did not agree to extended headers")
        for context in client.contexts:
            best = 1e9
            for _ in range(3):
                start_s = time.perf_counter()
                found = [extent async for extent in client.extents(context)]
                best = min(best, time.perf_counter() - start_s)
            if [(start, length) for start, length, _ in found] != [(0, 10 * TIB)]:
                raise RuntimeError(f"{context} of an empty volume has {len(found)} extents")
            what = f"{context} of 10 TiB of nothing, extended headers"
            results.append(Result(SECTION, what, best * 1000, "ms", STATUS_TARGET_MS))
    return results
