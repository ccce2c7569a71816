"""Checks and mapped ranges: what a volume and a snapshot hold, told from their maps alone, at any size."""

import errno
import random
import struct
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.tiers.helpers import block, fresh_pool, read, refusal, run
from tiers import Volume
from tiers.layout import BAD, BLOCK_BYTES, MIB, check_of
from tiers.mover import put_moved
from tiers.reader import Reader
from tiers.snapshot import Snapshot

GIB = 1 << 30
TIB = 1 << 40
LOST = (1 << 64) - 1


def expected_checks(content: bytes) -> bytes:
    """The definition: nothing but zeros is 0."""
    blocks = (content[at : at + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0") for at in range(0, len(content), BLOCK_BYTES))
    return b"".join(struct.pack("<Q", check_of(data) if any(data) else 0) for data in blocks)


async def assert_told(reader: Reader, rng: random.Random) -> None:
    """Checks and mapped ranges are those of the content, over all of it and any part."""
    content = await read(reader, 0, reader.size_bytes)  # type: ignore[arg-type]
    assert await reader.checks(0, reader.size_bytes) == expected_checks(content)
    for _ in range(4):
        offset = rng.randrange(reader.size_bytes)
        length = rng.randrange(reader.size_bytes - offset + 1)
        first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES) if length else offset // BLOCK_BYTES
        part = content[first * BLOCK_BYTES : end * BLOCK_BYTES]
        assert await reader.checks(offset, length) == expected_checks(part)
        mapped = await reader.mapped(offset, length)
        assert sum(mapped[-1]) == offset + length
        assert all(size for _, size in mapped[:-1])
        assert all(a + size < b for (a, size), (b, _) in pairwise(mapped))
        zeros = bytearray(content)
        for at, size in mapped:
            assert offset <= at <= at + size <= offset + length
            zeros[at : at + size] = bytes(size)
        assert not any(zeros[offset : offset + length]), "what isn't mapped is zeros"


@pytest.mark.parametrize("seed", range(2))
def test_they_are_those_of_what_is_read(tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        rng = random.Random(seed)
        async with fresh_pool(tmp_path) as pool:
            size = 6 * MIB + 512 * rng.randrange(3)
            volumes = [await pool.create_volume("v", size)]
            for turn in range(5):
                for volume in volumes:
                    for _ in range(30):
                        offset = rng.randrange(size)
                        length = min(size - offset, rng.choice((1, 512, 4096, 9000, 70000, 700_000)))
                        kind = rng.randrange(5)
                        if kind == 0:
                            await volume.trim(offset, length)
                        elif kind == 1:
                            await volume.write_zeroes(offset, length, no_hole=rng.random() < 0.5)
                        else:
                            await volume.write(offset, rng.randbytes(length) if kind > 2 else bytes(length))
                    await assert_told(volume, rng)
                if turn % 2:
                    await pool.checkpoint()
                if turn == 1:
                    await pool.take_snapshots([("v", "s")])
                    volumes.append(await pool.clone("v", "s", "c"))
                for snapshot in pool.snapshots():
                    await assert_told(snapshot, rng)

    run(body)


def test_a_lost_block_is_equal_to_nothing_and_zeros_are_equal_to_a_hole(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 16 * BLOCK_BYTES)
            await volume.write(0, block(1))
            await volume.write_zeroes(BLOCK_BYTES, BLOCK_BYTES, no_hole=True)
            await volume.write(3 * BLOCK_BYTES, block(2))
            put_moved(pool._engine, [(volume, 3, BAD, 0)])
            expected = struct.pack("<16Q", check_of(block(1)), 0, 0, LOST, *[0] * 12)
            assert await volume.checks(0, 16 * BLOCK_BYTES) == expected
            await pool.checkpoint()
            assert await volume.checks(0, 16 * BLOCK_BYTES) == expected
            assert await volume.mapped(0, 16 * BLOCK_BYTES) == [
                (0, 2 * BLOCK_BYTES),
                (3 * BLOCK_BYTES, BLOCK_BYTES),
                (16 * BLOCK_BYTES, 0),
            ]
            assert await volume.checks(5, 0) == b""
            assert await volume.mapped(5, 0) == [(5, 0)]

    run(body)


def test_terabytes_of_nothing_cost_little(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", 100 * TIB)
            for at in range(1, 100, 9):
                await volume.write(at * TIB, block(at))
            await pool.checkpoint()
            await volume.write(99 * TIB, block(3))
            begun = time.perf_counter()
            mapped = await volume.mapped(0, 100 * TIB)
            checks = await volume.checks(10 * TIB - 32 * GIB, 64 * GIB)
            assert time.perf_counter() - begun < 5  # 0.2 s
            assert [at // TIB for at, size in mapped if size] == [*range(1, 100, 9), 99]
            assert len(checks) == 8 * (64 * GIB // BLOCK_BYTES)
            at = len(checks) // 2
            assert checks[at : at + 8] == struct.pack("<Q", check_of(block(10)))
            assert checks.count(0) >= len(checks) - 8

    run(body)


def test_a_deleted_one_tells_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            volume = await pool.create_volume("v", MIB)
            (snapshot,) = await pool.take_snapshots([("v", "s")])
            await pool.delete_volume("v", snapshots=True)
            of: Volume | Snapshot
            for of in (volume, snapshot):
                assert (await refusal(lambda of=of: of.checks(0, MIB))).errno == errno.ESTALE  # type: ignore[misc]
                assert (await refusal(lambda of=of: of.mapped(0, MIB))).errno == errno.ESTALE  # type: ignore[misc]

    run(body)
