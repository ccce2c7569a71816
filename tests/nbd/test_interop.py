"""Clients that are not ours: libnbd's tools, QEMU's, and fio, against a server in this process.

They run in a directory of their own, as nbdsh would else import our package for libnbd's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from nbd.listen import open_tcp
from nbd.server import serve
from tests.nbd.client import Served, run, serving
from tests.nbd.memory import GRAIN, ContextExport, MemoryExport, MemoryExports, SparseExport

SIZE = 16 << 20


async def tool(directory: Path, *command: str) -> str:
    """Run a client in a neutral directory; returns its output, raises with it on failure."""
    # nbdsh runs the python3 it finds first, and libnbd's binding belongs to the distribution's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = "/usr/bin:/bin:" + environment.get("PATH", "")
    result = await trio.run_process(
        command, cwd=directory, env=environment, capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    text = result.stdout.decode()
    assert result.returncode == 0, f"{' '.join(command)}\n{text}"
    return text


def served(test: Callable[[Served, MemoryExport], Awaitable[None]], export: MemoryExport | None = None) -> None:
    export = export or MemoryExport("demo/vol", SIZE)

    async def main() -> None:
        async with serving(export) as server:
            await test(server, export)

    run(main, timeout_s=60)


both_speeds = pytest.mark.parametrize("slow", [False, True], ids=["at-once", "slow"])


def test_nbdinfo_sees_the_export_as_it_is() -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        info = json.loads(await tool(server.directory, "nbdinfo", "--json", server.uri("demo/vol")))
        assert info["protocol"] == "newstyle-fixed" and info["structured"] is True
        (seen,) = info["exports"]
        assert seen["export-size"] == SIZE
        assert seen["contexts"] == ["base:allocation"]
        assert (seen["block_size_minimum"], seen["block_size_preferred"], seen["block_size_maximum"]) == (
            1,
            4096,
            32 << 20,
        )
        true = {
            "can_cache",
            "can_df",
            "can_fast_zero",
            "can_flush",
            "can_fua",
            "can_multi_conn",
            "can_trim",
            "can_zero",
        }
        assert {name for name, value in seen.items() if value is True} == true
        listed = json.loads(await tool(server.directory, "nbdinfo", "--list", "--json", server.uri("")))
        assert [(one["export-name"], one["description"]) for one in listed["exports"]] == [
            ("demo/vol", "bytes in memory")
        ]

    served(test)


def test_nbdinfo_maps_holes() -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        export.write_now([(1 << 20, memoryview(b"x" * 8192))])
        extents = json.loads(await tool(server.directory, "nbdinfo", "--map", "--json", server.uri("demo/vol")))
        assert [(one["offset"], one["length"], one["type"]) for one in extents] == [
            (0, 1 << 20, 3),
            (1 << 20, 8192, 0),
            ((1 << 20) + 8192, SIZE - (1 << 20) - 8192, 3),
        ]

    served(test)


def changed_since_a() -> ContextExport:
    """The grains 16 to 31 are what changed since the snapshot a, and all of it since b."""
    export = ContextExport("demo/vol@c", SIZE)
    export.flags = {"terrace:diff:a": [0] * (SIZE // GRAIN), "terrace:diff:b": [1] * (SIZE // GRAIN)}
    export.flags["terrace:diff:a"][16:32] = [1] * 16
    return export


def test_nbdinfo_lists_and_maps_an_exports_own_contexts() -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        uri = server.uri("demo/vol@c")
        info = json.loads(await tool(server.directory, "nbdinfo", "--json", uri))
        assert info["exports"][0]["contexts"] == ["base:allocation", "terrace:diff:a", "terrace:diff:b"]
        extents = json.loads(await tool(server.directory, "nbdinfo", "--map=terrace:diff:a", "--json", uri))
        assert [(one["offset"], one["length"], one["type"]) for one in extents] == [
            (0, 65536, 0),
            (65536, 65536, 1),
            (131072, SIZE - 131072, 0),
        ]

    served(test, changed_since_a())


def test_qemu_img_maps_a_context_as_a_dirty_bitmap() -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        image = f"driver=nbd,server.type=unix,server.path={server.listener.address},export=demo/vol@c"
        command = ("qemu-img", "map", "--output=json", "--image-opts", f"{image},x-dirty-bitmap=terrace:diff:a")
        mapped = json.loads(await tool(server.directory, *command))
        # QEMU shows what is dirty as what has no data.
        assert [(one["start"], one["length"]) for one in mapped if not one["data"]] == [(65536, 65536)]

    served(test, changed_since_a())


@both_speeds
def test_nbdcopy_in_and_out_over_many_connections(slow: bool) -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        source, target = server.directory / "source", server.directory / "target"
        data = os.urandom(6 << 20) + bytes(4 << 20) + os.urandom(6 << 20)
        source.write_bytes(data)
        await tool(server.directory, "nbdcopy", "--flush", str(source), server.uri("demo/vol"))
        assert hashlib.sha256(export.data).digest() == hashlib.sha256(data).digest()
        assert ("flush", 0, 0) in export.calls
        await tool(server.directory, "nbdcopy", server.uri("demo/vol"), str(target))
        assert target.read_bytes() == data

    served(test, SparseExport("demo/vol", SIZE, slow=slow))


def test_nbdsh_sends_every_command() -> None:
    script = """
import errno, os
h.set_request_structured_replies(True)
h.add_meta_context("base:allocation")
h.connect_uri(URI)
h.pwrite(b"a" * 5000, 123, nbd.CMD_FLAG_FUA)
assert h.pread(5002, 122) == b"\\0" + b"a" * 5000 + b"\\0"
chunks = []
h.pread_structured(5000, 123, lambda data, offset, kind, error: chunks.append((data, offset, kind)), nbd.CMD_FLAG_DF)
assert chunks == [(b"a" * 5000, 123, nbd.READ_DATA)]
h.zero(4096, 200, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 200) == bytes(4096)
h.trim(1 << 20, 0, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
seen = []
h.block_status(1 << 20, 0, lambda context, offset, entries, error: seen.append((context, entries)))
assert seen[0][0] == "base:allocation" and seen[0][1][0] == 1 << 20
h.set_strict_mode(0)
for call, error in [
    (lambda: h.pread(1, h.get_size()), errno.EINVAL),
    (lambda: h.pwrite(b"x", h.get_size()), errno.ENOSPC),
    (lambda: h.zero(1, h.get_size()), errno.ENOSPC),
    (lambda: h.trim(1, h.get_size()), errno.EINVAL),
    (lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE), errno.EINVAL),
]:
    try:
        call()
        raise SystemExit("no error")
    except nbd.Error as failed:
        assert failed.errnum == error, failed
h.shutdown()
"""

    async def test(server: Served, export: MemoryExport) -> None:
        await tool(server.directory, "nbdsh", "-c", f"URI = {server.uri('demo/vol')!r}", "-c", script)

    served(test)


@both_speeds
def test_libnbd_has_no_complaint_about_holes_and_block_status(slow: bool) -> None:
    """Its debug log names whatever a server does that the protocol forbids or advises against."""
    script = """
h.set_request_structured_replies(True)
h.add_meta_context("base:allocation")
h.add_meta_context("terrace:diff:a")
h.connect_uri(URI)
size = h.get_size()
for offset, length, flags in [
    (0, size, 0), (4096, 1 << 20, 0), (100, 3 << 20, 0), (0, 1 << 20, nbd.CMD_FLAG_DF), (1 << 20, 65536, 0), (0, 1, 0),
]:
    chunks = []
    data = h.pread_structured(length, offset, lambda b, o, kind, error: chunks.append((o, kind, len(b))), flags)
    assert data == EXPECTED[offset : offset + length]
    kinds = {kind for _, kind, _ in chunks}
    assert kinds == ({nbd.READ_DATA, nbd.READ_HOLE} if length > 262144 and not flags else {nbd.READ_DATA}), chunks
for offset, length, flags in [(0, size, 0), (0, 4096, 0), (4095, size - 4095, nbd.CMD_FLAG_REQ_ONE)]:
    seen = {}
    h.block_status(length, offset, lambda context, o, entries, error: seen.update({context: entries}), flags)
    assert set(seen) == {"base:allocation", "terrace:diff:a"}
    assert all(len(entries) == 2 for entries in seen.values() if flags)
h.set_strict_mode(0)
for bad in (lambda: h.pread(1, size), lambda: h.block_status(1, size, lambda *a: 0), lambda: h.pread(0, 0)):
    try:
        bad()
    except nbd.Error:
        pass
h.shutdown()
"""

    async def test(server: Served, export: MemoryExport) -> None:
        for at in range(0, SIZE, 1 << 20):
            await export.write(at, os.urandom(300_000))
        image = server.directory / "expected"
        image.write_bytes(export.data)
        setup = f"h.set_debug(True); URI = {server.uri('demo/vol')!r}; EXPECTED = open({str(image)!r}, 'rb').read()"
        log = await tool(server.directory, "nbdsh", "-c", setup, "-c", script)
        assert log.count("negotiated ") == 3 and "eflags: 0xded" in log
        assert log.count("leave: error=") == 2, "the two requests past the end"
        harmless = re.compile(
            r"libnbd: debug: nbdsh: \w+: (enter:|leave: |event |poll |transition: |negotiated |exportsize: "
            r"|server block size constraints: min: 1 preferred: 4096 max: 33554432|closing handle)"
        )
        complaints = [line for line in log.splitlines() if line and not harmless.match(line)]
        assert not complaints, complaints

    sparse = SparseExport("demo/vol", SIZE, slow=slow)
    sparse.flags = {"terrace:diff:a": [0, 1] * (SIZE // GRAIN // 2)}
    served(test, sparse)


@both_speeds
def test_qemu_io_writes_verifies_and_discards(slow: bool) -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        commands = [
            "write -P 0xab 0 1M",
            "write -f -P 0xcd 1M 3M",
            "write -P 0x11 513 5000",
            "read -P 0x11 513 5000",
            "read -P 0xab 6000 1042576",
            "read -P 0xcd 1M 3M",
            "write -z 1M 64k",
            "read -P 0 1M 64k",
            "discard 2M 1M",
            "flush",
            "aio_write -P 0x77 8M 2M",
            "aio_write -P 0x78 10M 2M",
            "aio_flush",
            "read -P 0x77 8M 2M",
            "read -P 0x78 10M 2M",
        ]
        arguments = [part for command in commands for part in ("-c", command)]
        text = await tool(server.directory, "qemu-io", "-f", "raw", *arguments, server.uri("demo/vol"))
        assert "failed" not in text and "Pattern verification" not in text, text

    served(test, MemoryExport("demo/vol", SIZE, slow=slow))


def test_qemu_img_converts_in_and_compares() -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        source = server.directory / "source.raw"
        source.write_bytes(os.urandom(3 << 20) + bytes(10 << 20) + os.urandom(3 << 20))
        uri = server.uri("demo/vol")
        await tool(server.directory, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
        text = await tool(server.directory, "qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
        assert "identical" in text
        mapped = json.loads(await tool(server.directory, "qemu-img", "map", "-f", "raw", "--output=json", uri))
        assert sum(one["length"] for one in mapped) == SIZE

    served(test)


@both_speeds
def test_fio_verifies_what_it_wrote(slow: bool) -> None:
    async def test(server: Served, export: MemoryExport) -> None:
        common = ["fio", "--ioengine=nbd", f"--uri={server.uri('demo/vol')}", "--verify=crc32c", "--iodepth=32"]
        shape = ["--name=verify", "--rw=randrw", "--bsrange=512-128k", "--bs_unaligned=1", f"--size={SIZE}"]
        text = await tool(server.directory, *common, *shape, "--verify_fatal=1", "--fsync=64")
        assert "err= 0" in text, text

    served(test, MemoryExport("demo/vol", SIZE, slow=slow))


def test_tools_work_over_tcp_too() -> None:
    async def main() -> None:
        (listener,) = await open_tcp("127.0.0.1", 0)
        export = MemoryExport("demo/vol", SIZE)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, MemoryExports(export), [listener])
            commands = ("-c", "write -P 7 0 4M", "-c", "read -P 7 0 4M")
            text = await tool(Path("/"), "qemu-io", "-f", "raw", *commands, listener.uri("demo/vol"))
            assert "failed" not in text
            assert export.data[: 4 << 20] == b"\7" * (4 << 20)
            await server.drain(0.1)

    run(main, timeout_s=60)
