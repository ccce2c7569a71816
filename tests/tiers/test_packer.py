"""The packer: what the log left on base is compressed once nobody waits for space, and nothing else is touched."""

from __future__ import annotations

import errno
import random

import pytest
import trio

from tests.simulation.machine import Disk, Machine
from tests.simulation.oracle import BLOCK, read_all, require_sound
from tests.tiers.test_packed import text
from tiers import Policy, Pool, PoolSettings, Volume
from tiers.layout import SLOT_BITS
from tiers.mover import OutputFullError
from tiers.record import Kind

SETTINGS = PoolSettings(checkpoint_interval_s=1.0, overlay_entries=1 << 15, pack_after_s=5.0)
TEXT = text(1, 250 * BLOCK)
NOISE = random.Random(1).randbytes(250 * BLOCK)


async def spill(pool: Pool, data: bytes, policy: Policy | None = None) -> Volume:
    """A volume whose data the log has written to base."""
    log = pool._engine.log
    pick = log.pick_device
    base = next(device for device in pool._engine.devices if device.tier == "base")
    volume = await pool.create_volume("v", len(data))
    if policy is not None:
        volume.policy = policy
    log.pick_device = lambda: base
    log.roll()
    for at in range(0, len(data), 10 * BLOCK):
        assert volume.write_now([(at, data[at : at + 10 * BLOCK])])
    log.pick_device = pick
    log.roll()
    return volume


def kinds(pool: Pool, volume: Volume) -> dict[Kind, int]:
    """Blocks by the kind of segment that they lie in."""
    found: dict[Kind, int] = {}
    for block in range(volume.size_bytes // BLOCK):
        entry = volume.entry_now(block)
        assert entry is not None
        kind = volume._segments[entry[0] >> SLOT_BITS].kind
        found[kind] = found.get(kind, 0) + 1
    return found


def machine_of(*disks: Disk, settings: PoolSettings = SETTINGS) -> Machine:
    return Machine(disks or (Disk("fast", 60), Disk("base", 60)), seed=1, settings=settings)


def test_what_the_log_left_on_base_is_packed_after_a_rest_and_survives_a_power_cut() -> None:
    machine = machine_of()

    async def main() -> None:
        async with machine.open() as pool:
            volume = await spill(pool, TEXT)
            await trio.sleep(4)
            assert kinds(pool, volume) == {Kind.LOG: 250}
            await trio.sleep(20)
            assert kinds(pool, volume)[Kind.PACKED] > 240
            assert await read_all(volume) == TEXT
            await require_sound(pool)
            moved = pool.status().blocks_moved
            await trio.sleep(100)
            assert pool.status().blocks_moved == moved, "nothing is packed twice"
            live = {s.kind for s in pool._engine.segments.by_id.values() if s.device.tier == "base" and s.live > 20}
            assert live == {Kind.PACKED}
            machine.stop()
        machine.power_cut()
        async with machine.open() as pool:
            assert await read_all(pool.volume("v")) == TEXT
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize(
    ("data", "policy"),
    [(NOISE, None), (TEXT, Policy(compression_level=0))],
    ids=["noise", "a policy without compression"],
)
def test_what_does_not_become_smaller_stays_where_it_is(data: bytes, policy: Policy | None) -> None:
    machine = machine_of()

    async def main() -> None:
        async with machine.open() as pool:
            volume = await spill(pool, data, policy)
            await trio.sleep(60)
            assert kinds(pool, volume) == {Kind.LOG: 250}
            assert pool.status().blocks_moved == 0
            assert await read_all(volume) == data

    machine.run(main)


def test_a_pool_without_a_fast_tier_is_left_alone() -> None:
    machine = machine_of(Disk("base", 60))

    async def main() -> None:
        async with machine.open() as pool:
            volume = await spill(pool, TEXT)
            await trio.sleep(60)
            assert kinds(pool, volume) == {Kind.LOG: 250}

    machine.run(main)


def test_it_waits_while_others_need_space() -> None:
    machine = machine_of()

    async def main() -> None:
        async with machine.open() as pool:
            volume = await spill(pool, TEXT)
            pool._engine.space.waiters += 1
            await trio.sleep(60)
            assert kinds(pool, volume) == {Kind.LOG: 250}
            pool._engine.space.waiters -= 1
            await trio.sleep(20)
            assert Kind.LOG not in kinds(pool, volume) or kinds(pool, volume)[Kind.LOG] < 10

    machine.run(main)


def test_it_keeps_to_the_rate_of_the_policy() -> None:
    machine = machine_of()
    policy = Policy(migration_rate_bytes=64 << 10)

    async def main() -> None:
        async with machine.open() as pool:
            volume = await spill(pool, TEXT, policy)
            await trio.sleep(8)
            early = kinds(pool, volume).get(Kind.PACKED, 0)
            assert early <= (8 + 2) * 16
            await trio.sleep(60)
            assert kinds(pool, volume)[Kind.PACKED] > max(200, early)
            assert await read_all(volume) == TEXT

    machine.run(main)


def test_a_base_that_refuses_writes_is_tried_again() -> None:
    machine = machine_of()

    async def main() -> None:
        async with machine.open() as pool:
            volume = await spill(pool, TEXT)
            medium = machine.media[1]
            failed = 0

            def refuse(offset: int, length: int) -> tuple[int, int] | None:
                nonlocal failed
                if failed >= 3:
                    return None
                failed += 1
                return 5, 0

            await trio.sleep(1)
            medium.on_write = refuse
            await trio.sleep(60)
            assert failed == 3
            assert await read_all(volume) == TEXT
            await require_sound(pool)

    machine.run(main)


def tiers_of(volume: Volume) -> dict[str, int]:
    """Blocks by the tier that they lie on."""
    found: dict[str, int] = {}
    for block in range(volume.size_bytes // BLOCK):
        entry = volume.entry_now(block)
        assert entry is not None
        tier = volume._segments[entry[0] >> SLOT_BITS].device.tier
        found[tier] = found.get(tier, 0) + 1
    return found


def test_a_volume_of_placement_base_leaves_the_fast_tier_and_others_stay() -> None:
    machine = machine_of()

    async def main() -> None:
        async with machine.open() as pool:
            pool.define_policies({"cold": Policy("cold", placement="base", stream_cutoff_bytes=0)})
            cold = await pool.create_volume("cold", len(NOISE), "cold")
            plain = await pool.create_volume("plain", len(NOISE))
            for at in range(0, len(NOISE), 10 * BLOCK):
                for volume in (cold, plain):
                    assert volume.write_now([(at, NOISE[at : at + 10 * BLOCK])])
            pool._engine.log.roll()
            assert tiers_of(cold) == {"fast": 250}
            await trio.sleep(40)
            assert tiers_of(cold) == {"base": 250}
            assert tiers_of(plain) == {"fast": 250}
            await pool.set_policy("plain", "cold")
            await trio.sleep(40)
            assert tiers_of(plain) == {"base": 250}
            moved = pool.status().blocks_moved
            await trio.sleep(100)
            assert pool.status().blocks_moved == moved, "nothing is moved twice"
            assert await read_all(cold) == await read_all(plain) == NOISE
            await require_sound(pool)

    machine.run(main)


@pytest.mark.parametrize("refusal", [OutputFullError(errno.ENOSPC, "full"), OSError(errno.EIO, "a bad device")])
def test_what_it_could_not_finish_holds_no_segment_while_it_rests(refusal: OSError) -> None:
    machine = machine_of()

    async def main() -> None:
        async with machine.open() as pool:
            packer = pool._packer
            apply = packer.mover.apply_staged
            refused: list[float] = []

            async def refuse() -> None:
                packer.mover.apply_staged = apply  # type: ignore[method-assign]
                assert packer.mover.has_staged
                refused.append(trio.current_time())
                raise refusal

            packer.mover.apply_staged = refuse  # type: ignore[method-assign]
            volume = await spill(pool, TEXT)
            while not refused:
                await trio.sleep(0.1)
            assert trio.current_time() - refused[0] < 1
            packed = [s for s in pool._engine.segments.by_id.values() if s.kind is Kind.PACKED]
            assert not any(segment.open or segment.pins for segment in packed), "a checkpoint may free them"
            assert await read_all(volume) == TEXT
            await require_sound(pool)

    machine.run(main)
