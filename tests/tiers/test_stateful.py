"""The engine against its promise: random programs and crashes, judged by the oracle; and proof that it can judge."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.oracle import BLOCK, Model, Op, OracleError, read_all, require_sound
from tiers import Pool, PoolSettings

# -- the oracle can say no ---------------------------------------------------------------------------------------------


def test_the_oracle_refuses_a_hole_in_the_middle_of_the_history() -> None:
    model = Model(4 * BLOCK)
    for i in range(3):
        model.returned(Op("write", [(i * BLOCK, bytes([i + 1]) * BLOCK)]))
    without_the_second = bytearray(model.content)
    without_the_second[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    with pytest.raises(OracleError):
        model.judge(bytes(without_the_second), everything=False)


def test_the_oracle_refuses_the_loss_of_what_was_flushed() -> None:
    model = Model(BLOCK)
    model.returned(Op("write", [(0, b"x" * BLOCK)]))
    model.flushed(model.mark)
    with pytest.raises(OracleError):
        model.judge(bytes(BLOCK), everything=False)


# -- programs that shrink ----------------------------------------------------------------------------------------------

VOLUME_BYTES = 96 * BLOCK
OFFSETS = st.one_of(
    st.integers(0, VOLUME_BYTES // BLOCK - 1).map(lambda block: block * BLOCK), st.integers(0, VOLUME_BYTES - 1)
)
LENGTHS = st.sampled_from((1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 7, 33 * BLOCK))
RANGES = st.tuples(OFFSETS, LENGTHS)
STEPS = st.one_of(
    st.tuples(st.just("batch"), st.lists(RANGES, min_size=1, max_size=5)),
    st.tuples(st.just("write"), RANGES),
    st.tuples(st.just("zeroes"), RANGES),
    st.tuples(st.just("no_hole"), RANGES),
    st.tuples(st.just("trim"), RANGES),
    st.tuples(st.just("resize"), st.integers(8, 2 * VOLUME_BYTES // 512).map(lambda sectors: sectors * 512)),
    st.tuples(st.sampled_from(("flush", "checkpoint", "clean", "reopen", "kill", "power cut")), st.none()),
)


class Program:
    """Runs steps against a volume and its model."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.model = Model(VOLUME_BYTES)
        self.stamp = 0

    def data(self, length: int) -> bytes:
        self.stamp = self.stamp % 255 + 1
        return bytes([self.stamp]) * length

    async def run(self, steps: list[tuple[str, Any]]) -> None:
        async with self.machine.open() as pool:
            await pool.create_volume("v", VOLUME_BYTES)
        todo = list(steps)
        while todo:
            everything = True
            async with self.machine.open() as pool:
                while todo:
                    kind, argument = todo.pop(0)
                    if kind in ("reopen", "kill", "power cut"):
                        break
                    await self.step(pool, kind, argument)
                else:
                    kind = "reopen"
                if kind != "reopen":
                    self.machine.stop()
                    await trio.lowlevel.checkpoint()
            if kind == "power cut":
                self.machine.power_cut()
                everything = False
            else:
                self.machine.kill()
            async with self.machine.open() as pool:
                self.model.judge(await read_all(pool.volume("v")), everything=everything)
                await require_sound(pool)

    async def step(self, pool: Pool, kind: str, argument: Any) -> None:
        volume = pool.volume("v")
        size = volume.size_bytes
        if kind == "batch":
            writes = []
            for offset, length in argument:
                if offset < size:
                    writes.append((offset, self.data(min(length, size - offset))))
            if volume.write_now(writes):
                self.model.returned(Op("batch", writes))
            else:
                for offset, data in writes:
                    await volume.write(offset, data)
                    self.model.returned(Op("write", [(offset, data)]))
        elif kind == "resize":
            await pool.resize_volume("v", argument)
            self.model.returned(Op("resize", size=argument))
            self.model.flushed(self.model.mark)
        elif kind == "flush":
            await volume.flush()
            self.model.flushed(self.model.mark)
        elif kind == "checkpoint":
            await pool.checkpoint()
            self.model.flushed(self.model.mark)
        elif kind == "clean":
            pool._engine.space.kick_cleaner.set()
            await trio.sleep(0.01)
        else:
            offset, length = argument
            if offset >= size:
                return
            length = min(length, size - offset)
            if kind == "write":
                data = self.data(length)
                await volume.write(offset, data)
                self.model.returned(Op("write", [(offset, data)]))
            elif kind == "trim":
                await volume.trim(offset, length)
                start, end = -(-offset // BLOCK) * BLOCK, offset + length
                end = end if end == size else end // BLOCK * BLOCK
                self.model.returned(Op("trim", [(start, bytes(max(0, end - start)))]))
            else:
                await volume.write_zeroes(offset, length, no_hole=kind == "no_hole")
                self.model.returned(Op(kind, [(offset, bytes(length))]))
        assert await read_all(volume) == self.model.content


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEPS, max_size=30), seed=st.integers(0, 1 << 16), points=st.booleans(), cold=st.booleans())
def test_any_program_with_crashes_reads_as_a_bytearray_would(
    steps: list[tuple[str, Any]], seed: int, points: bool, cold: bool
) -> None:
    machine = Machine(
        (Disk("fast", 20, 64 << 10), Disk("base", 40, 64 << 10)),
        seed=seed,
        settings=PoolSettings(
            overlay_entries=1024, unsynced_cap_bytes=1 << 20, small_volume_leaves=0 if points else 8192
        ),
    )
    machine.cold_share = 0.5 if cold else 0.0
    program = Program(machine)
    machine.run(lambda: program.run(steps))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 16), crashes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_recoveries_that_crash_again_and_again_lose_nothing(seed: int, crashes: list[int]) -> None:
    machine = Machine((Disk("fast", 30), Disk("base", 30)), seed=seed)
    content = bytes([7]) * (40 * BLOCK)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await pool.create_volume("v", VOLUME_BYTES)
            await volume.write(BLOCK + 3, content)
            await volume.trim(2 * BLOCK, 3 * BLOCK)
            await volume.flush()
            machine.stop()
            await trio.lowlevel.checkpoint()
        machine.power_cut()
        for countdown in crashes:
            machine.countdown = countdown
            with contextlib.suppress(PowerCutError):
                async with machine.open():
                    machine.countdown = None
                    machine.stop()
                    await trio.lowlevel.checkpoint()
            machine.power_cut()
        async with machine.open() as pool:
            expected = bytearray(VOLUME_BYTES)
            expected[BLOCK + 3 : BLOCK + 3 + len(content)] = content
            expected[2 * BLOCK : 5 * BLOCK] = bytes(3 * BLOCK)
            assert await read_all(pool.volume("v")) == expected
            await require_sound(pool)

    machine.run(main)
