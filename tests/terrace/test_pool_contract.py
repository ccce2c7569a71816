"""What the application relies on in a pool: one suite over the engine and over the fake that other tests use for it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.terrace.fakepool import FakePool
from tiers import DeviceSpec, Policy, Pool, PoolSettings, TierError
from tiers.policy import DEFAULT

MIB = 1 << 20
PATTERN = bytes(range(256)) * 16

Scenario = Callable[[Any, Path], Awaitable[None]]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


@pytest.mark.parametrize("engine", [Pool, FakePool])
@pytest.mark.parametrize("promise", SCENARIOS, ids=lambda promise: promise.__name__)
def test_a_pool_keeps_what_the_application_relies_on(engine: Any, promise: Scenario, tmp_path: Path) -> None:
    trio.run(promise, engine, tmp_path)


async def make(engine: Any, directory: Path, *, devices: int = 1) -> Path:
    specs = [DeviceSpec(directory / f"device{number}", "fast", 64 * MIB) for number in range(devices)]
    # As the application does it: the directory is there and empty.
    (directory / "pool").mkdir()
    await engine.create(directory / "pool", "p", specs, force=False)
    return directory / "pool"


def refusal(error: pytest.ExceptionInfo[TierError]) -> int | None:
    """The errno of an error that is one sentence without the number in it."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert "[Errno" not in text
    return error.value.errno


@scenario
async def data_and_volumes_survive_closing(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        assert volume.write_now([(0, memoryview(PATTERN))])
        await volume.flush()
        uuid = pool.uuid
    async with engine.open(directory) as pool:
        assert (pool.name, pool.uuid) == ("p", uuid)
        (volume,) = pool.volumes()
        assert (volume.name, volume.size_bytes, volume.open_count) == ("p/v", MIB, 0)
        into = bytearray(len(PATTERN))
        await volume.read(0, len(into), memoryview(into))
        assert into == PATTERN


@scenario
async def the_status_adds_up(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path, devices=2)
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, PATTERN)
        await pool.checkpoint()
        status = pool.status()
        assert (status.name, status.uuid, status.state, status.problem) == ("p", pool.uuid, "online", None)
        assert status.nominal_bytes == MIB
        assert 0 < status.used_bytes <= status.capacity_bytes
        assert status.available_bytes <= status.capacity_bytes
        assert [(d.tier, d.size_bytes, d.state, d.errors) for d in status.devices] == 2 * [
            ("fast", 64 * MIB, "online", 0)
        ]
        assert [(v.name, v.size_bytes, v.mapped_bytes) for v in status.volumes] == [("p/v", MIB, len(PATTERN))]


@scenario
async def volumes_grow_shrink_and_go(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(MIB - 4096, PATTERN)
        assert (await pool.resize_volume("v", 4096)).size_bytes == 4096
        await pool.resize_volume("v", MIB)
        into = bytearray(b"x" * 4096)
        await pool.volume("v").read(MIB - 4096, 4096, memoryview(into))
        assert into == bytes(4096)
        await pool.delete_volume("v")
        assert pool.volumes() == []


@scenario
async def a_volume_in_use_is_neither_deleted_nor_shrunk(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        volume.acquire()
        assert volume.open_count == 1
        for attempt in (pool.delete_volume("v"), pool.resize_volume("v", 4096)):
            with pytest.raises(TierError) as error:
                await attempt
            assert refusal(error) == errno.EBUSY
            assert "p/v" in str(error.value)
        await pool.resize_volume("v", 2 * MIB)
        volume.release()
        await pool.delete_volume("v")


@scenario
async def what_is_not_there_or_not_possible_is_refused_with_its_errno(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        await pool.create_volume("v", MIB)
        for number, attempt in (
            (errno.EEXIST, pool.create_volume("v", MIB)),
            (errno.EINVAL, pool.create_volume("a/b", MIB)),
            (errno.EINVAL, pool.create_volume("w", 0)),
            (errno.EINVAL, pool.create_volume("w", 1 << 63)),
            (errno.EINVAL, pool.resize_volume("v", 7)),
            (errno.ENOENT, pool.resize_volume("none", MIB)),
            (errno.ENOENT, pool.delete_volume("none")),
            (errno.ENOENT, pool.grow([DeviceSpec(tmp_path / "none", "fast")])),
        ):
            with pytest.raises(TierError) as error:
                await attempt
            assert refusal(error) == number
        with pytest.raises(TierError) as error:
            pool.volume("none")
        assert refusal(error) == errno.ENOENT


@scenario
async def a_volume_keeps_the_name_of_its_policy_and_the_application_says_what_it_means(
    engine: Any, tmp_path: Path
) -> None:
    directory = await make(engine, tmp_path)
    gold, default = Policy("gold", iops_limit=5), Policy(promote_touches=9)
    async with engine.open(directory) as pool:
        plain = await pool.create_volume("plain", MIB)
        assert plain.policy is DEFAULT
        for attempt in (pool.create_volume("v", MIB, "gold"), pool.set_policy("plain", "gold")):
            with pytest.raises(TierError) as error:
                await attempt
            assert refusal(error) == errno.ENOENT
        pool.define_policies({"gold": gold, "default": default})
        made = await pool.create_volume("v", MIB, "gold")
        assert (made.policy_name, made.policy, plain.policy) == ("gold", gold, default)
        assert await pool.set_policy("plain", "gold") is plain
        assert plain.policy is gold
        await pool.set_policy("plain", "default")
        assert (plain.policy_name, plain.policy) == ("", default)
        with pytest.raises(TierError) as error:
            await pool.set_policy("none", "gold")
        assert refusal(error) == errno.ENOENT
        assert [(v.name, v.policy, v.policy_missing) for v in pool.status().volumes] == [
            ("p/plain", "default", False),
            ("p/v", "gold", False),
        ]
    async with engine.open(directory) as pool:
        volume = pool.volume("v")
        pool.define_policies({})
        assert (volume.policy_name, volume.policy, volume.policy_missing) == ("gold", DEFAULT, True)
        assert pool.status().volumes[1].policy_missing
        pool.define_policies({"gold": gold})
        assert (volume.policy, volume.policy_missing) == (gold, False)


@scenario
async def a_pool_grows_while_it_is_open(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        before_bytes = pool.status().capacity_bytes
        await pool.grow([DeviceSpec(tmp_path / "more", "base", 64 * MIB)], force=False)
        assert pool.status().capacity_bytes > before_bytes
    async with engine.open(directory) as pool:
        assert [device.tier for device in pool.status().devices] == ["fast", "base"]


@scenario
async def a_check_tells_its_progress_and_finds_nothing_wrong(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    told: list[tuple[int, int]] = []
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, PATTERN)
        report = await pool.check(True, lambda done, total: told.append((done, total)))
        assert (report.ok, report.problems, report.volumes) == (True, [], 1)
        assert report.blocks_mapped == 1
        assert report.bytes_checked == len(PATTERN)
        await pool.checkpoint()
    assert told
    assert all(0 <= done <= total for done, total in told)


@scenario
async def a_scrub_runs_in_the_background_and_its_result_outlives_the_pool(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path, devices=2)
    async with engine.open(directory, settings=PoolSettings(scrub_rate_bytes=1 << 40)) as pool:
        never = pool.scrubber.status()
        assert (never.state, never.started_at, never.last, never.devices, never.rate) == ("never", None, None, [], 0)
        assert pool.status().scrub == never
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, PATTERN)
        await pool.checkpoint()
        begun = await pool.scrubber.start(scheduled=True)
        assert begun.state in ("running", "finished")  # there is little to read
        assert (begun.scheduled, begun.rate) == (True, 1 << 40)
        while pool.scrubber.running:
            await trio.sleep(0.01)
        done = pool.scrubber.status()
        assert (done.state, done.errors, done.damage, done.damage_omitted) == ("finished", 0, [], 0)
        assert done.done_bytes == done.total_bytes > 0
        assert sum(device.done_bytes for device in done.devices) == done.done_bytes
        assert [device.path for device in done.devices] == [str(tmp_path / f"device{n}") for n in range(2)]
        assert done.started_at is not None
        assert done.last is not None
        assert done.since <= done.started_at <= done.last.finished_at == done.finished_at
        assert (done.last.errors, done.last.done_bytes) == (0, done.done_bytes)
        for action in (pool.scrubber.pause, pool.scrubber.stop):
            with pytest.raises(TierError) as error:
                await action()
            assert refusal(error) == errno.ENOENT
        with pytest.raises(TierError) as error:
            await pool.scrubber.start(7)
        assert refusal(error) == errno.EINVAL
    async with engine.open(directory) as pool:
        kept = pool.scrubber.status()
        assert (kept.state, kept.last, kept.since) == ("finished", done.last, done.since)


@scenario
async def a_scrub_that_is_left_is_interrupted_and_can_be_resumed_paused_and_stopped(
    engine: Any, tmp_path: Path
) -> None:
    directory = await make(engine, tmp_path)
    (directory / "slow-scrub").write_text("3600")
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        for at in range(0, MIB, len(PATTERN)):
            await volume.write(at, PATTERN)
        await pool.scrubber.start(64 << 10, scheduled=True)
        await trio.sleep(0.1)
        assert pool.scrubber.running
    async with engine.open(directory) as pool:
        left = pool.scrubber.status()
        assert (left.state, left.scheduled, left.rate, left.eta_s) == ("interrupted", True, 64 << 10, None)
        assert (await pool.scrubber.start(scheduled=True)).scheduled
        waiting = await pool.scrubber.pause(waiting=True)
        assert (waiting.state, waiting.started_at) == ("waiting", left.started_at)
        asked_for = await pool.scrubber.start()
        assert (asked_for.state, asked_for.scheduled, asked_for.rate) == ("running", False, 64 << 10)
        assert (await pool.scrubber.pause()).state == "paused"
        stopped = await pool.scrubber.stop()
        assert (stopped.state, stopped.last) == ("stopped", None)
        assert stopped.finished_at is not None


@scenario
async def an_open_pool_is_not_opened_twice(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory):
        with pytest.raises(TierError) as error:
            async with engine.open(directory):
                pass
        assert refusal(error) == errno.EBUSY


@scenario
async def a_heat_map_has_a_range_for_each_part_of_a_volume(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        await pool.create_volume("v", 10 * MIB + 4096)
        for ranges, count, range_bytes in ((1, 1, 161 << 16), (5, 5, 33 << 16), (4096, 161, 1 << 16)):
            found = await pool.heat_map("v", ranges)
            assert (found.volume, found.size_bytes, found.range_bytes) == ("p/v", 10 * MIB + 4096, range_bytes)
            lists = (found.fast_bytes, found.base_bytes, found.fast_heat, found.base_heat, found.reads, found.writes)
            assert [len(values) for values in lists] == [count] * 6
        with pytest.raises(TierError) as error:
            await pool.heat_map("none", 5)
        assert refusal(error) == errno.ENOENT


@scenario
async def a_destroyed_pool_is_gone_but_its_device_files_stay(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        await pool.create_volume("v", MIB)
    await engine.destroy(directory)
    assert not directory.exists()
    assert (tmp_path / "device0").stat().st_size == 64 * MIB
    directory.mkdir()
    await engine.create(directory, "p", [DeviceSpec(tmp_path / "device0", "fast")])
    async with engine.open(directory) as pool:
        assert pool.volumes() == []


@scenario
async def a_pool_that_could_not_be_made_leaves_no_files(engine: Any, tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    directory.mkdir()
    for devices in ([], [DeviceSpec(tmp_path / "none", "fast")], [DeviceSpec(tmp_path / "tiny", "fast", 4096)]):
        with pytest.raises(TierError) as error:
            await engine.create(directory, "p", devices)
        assert refusal(error) in (errno.EINVAL, errno.ENOENT)
        assert list(directory.iterdir()) == []
        assert list(tmp_path.iterdir()) == [directory]
        with pytest.raises(TierError) as error:
            async with engine.open(directory):
                pass
        assert refusal(error) == errno.ENOENT


async def content(export: Any) -> bytes:
    into = bytearray(len(PATTERN))
    await export.read(0, len(into), memoryview(into))
    return bytes(into)


@scenario
async def a_snapshot_keeps_what_was_and_outlives_the_pool(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await pool.create_volume("w", MIB)
        await volume.write(0, PATTERN)
        taken = await pool.take_snapshots([("v", "s"), ("w", "s")])
        assert [snapshot.name for snapshot in taken] == ["p/v@s", "p/w@s"]
        await volume.write(0, bytes(len(PATTERN)))
        assert (taken[0].short_name, taken[0].size_bytes, taken[0].read_only) == ("s", MIB, True)
        assert await content(taken[0]) == PATTERN
        for number, attempt in (
            (errno.EEXIST, pool.take_snapshots([("w", "t"), ("v", "s")])),
            (errno.ENOENT, pool.take_snapshots([("w", "t"), ("none", "t")])),
            (errno.EINVAL, pool.take_snapshots([("w", "t"), ("v", "a@b")])),
            (errno.EINVAL, pool.take_snapshots([("w", "t"), ("w", "t")])),
            (errno.EBUSY, pool.delete_volume("v")),
        ):
            with pytest.raises(TierError) as error:
                await attempt
            assert refusal(error) == number
        assert [snapshot.name for snapshot in pool.snapshots()] == ["p/v@s", "p/w@s"]
    async with engine.open(directory) as pool:
        assert await content(pool.snapshot("v", "s")) == PATTERN
        assert [volume.snapshots for volume in pool.status().volumes] == [1, 1]
        (status,) = await pool.snapshot_status("v", "s")
        assert (status.name, status.volume, status.snapshot) == ("p/v@s", "p/v", "s")
        assert (status.size_bytes, status.held, status.open_count, status.clones) == (MIB, False, 0, [])
        assert status.exclusive_bytes + status.shared_bytes == status.referenced_bytes
        assert len(await pool.snapshot_status()) == 2
        await pool.delete_volume("v", snapshots=True)
        assert [snapshot.name for snapshot in pool.snapshots()] == ["p/w@s"]


@scenario
async def a_snapshot_is_renamed_held_cloned_and_rolled_back_to(engine: Any, tmp_path: Path) -> None:
    directory = await make(engine, tmp_path)
    async with engine.open(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, PATTERN)
        await pool.take_snapshots([("v", "s")])
        assert (await pool.change_snapshot("v", "s", new_name="u", held=True)).name == "p/v@u"
        with pytest.raises(TierError) as error:
            await pool.delete_snapshot("v", "u")
        assert refusal(error) == errno.EBUSY
        await pool.change_snapshot("v", "u", held=False)
        clone = await pool.clone("v", "u", "c")
        assert await content(clone) == PATTERN
        assert (await pool.snapshot_status("v", "u"))[0].clones == ["p/c"]
        assert next(one.origin for one in pool.status().volumes if one.name == "p/c") == "p/v@u"
        with pytest.raises(TierError) as error:
            await pool.promote("v")
        assert refusal(error) == errno.EINVAL
        await pool.take_snapshots([("c", "s")])
        with pytest.raises(TierError) as error:
            await pool.promote("c")
        assert refusal(error) == errno.EBUSY
        await pool.delete_snapshot("c", "s")
        for _ in range(100):  # until what the snapshot kept is sorted out
            with contextlib.suppress(TierError):
                await pool.promote("c")
                break
            await trio.sleep(0.05)
        assert next(one.origin for one in pool.status().volumes if one.name == "p/c") is None
        assert await content(clone) == PATTERN
        await volume.write(0, bytes(len(PATTERN)))
        volume.acquire()
        with pytest.raises(TierError) as error:
            await pool.rollback("v", "u", keep_as="before")
        assert refusal(error) == errno.EBUSY
        volume.release()
        assert await content(await pool.rollback("v", "u", keep_as="before")) == PATTERN
        assert await content(pool.snapshot("v", "before")) == bytes(len(PATTERN))
        snapshot = pool.snapshot("v", "before")
        snapshot.acquire()
        with pytest.raises(TierError) as error:
            await pool.delete_snapshot("v", "before")
        assert refusal(error) == errno.EBUSY
        snapshot.release()
        await pool.delete_snapshot("v", "before")
        await pool.delete_snapshot("v", "u")
        for attempt in (
            pool.delete_snapshot("v", "u"),
            pool.clone("v", "u", "d"),
            pool.rollback("v", "u", keep_as=None),
            pool.change_snapshot("v", "u", held=True),
        ):
            with pytest.raises(TierError) as error:
                await attempt
            assert refusal(error) == errno.ENOENT
        assert await content(pool.volume("c")) == PATTERN
        assert await content(pool.volume("v")) == PATTERN
