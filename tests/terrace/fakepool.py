"""A pool without an engine: sparse files, one per volume. For tests of the application that need no storage engine.

`test_pool_contract.py` runs one suite over this and over `tiers.Pool`, so that what the application learns here is
true there. What the real one does only in bad luck, this one does on demand, by a file in the pool's directory:

    fail-open       opening raises its text as EIO
    bad-log         opening raises EIO unless the log may be truncated
    slow-open       opening takes as many seconds as its text says
    one-slow-open   the same, once: the file is gone when it begins
    fail-one-open   as fail-open, once
    fail-later      once the file appears, the running pool fails with its text
    slow-checkpoint a checkpoint takes as many seconds as its text says
    slow-check      a check takes as many seconds as its text says, with progress
    stuck-close     closing takes as many seconds as its text says
    slow-scrub      a scrub takes as many seconds as its text says, for as long as the file is there
    rot             a scrub finds the first block of the volume that its text names damaged
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from tiers import (
    CheckReport,
    Damage,
    DeviceScrub,
    DeviceSpec,
    DeviceStatus,
    EvacuationStatus,
    HeatMap,
    Loss,
    Policy,
    PoolSettings,
    PoolStatus,
    Result,
    ScrubStatus,
    SnapshotStatus,
    TierError,
    VolumeStatus,
)
from tiers.names import validate_name, validate_volume_size
from tiers.policy import DEFAULT

BLOCK_BYTES = 4096
MIB = 1 << 20
MIN_DEVICE_BYTES = 32 * MIB


class FakeVolume:
    """One sparse file. Everything is in the kernel at once, so nothing ever needs to wait."""

    description = ""
    read_only = False
    rotational = False
    can_multi_conn = True
    minimum_block_size = 1
    preferred_block_size = BLOCK_BYTES
    maximum_payload = 32 << 20

    def __init__(self, pool_name: str, path: Path, size_bytes: int) -> None:
        self.short_name = path.name.removesuffix(".raw")
        self.name = f"{pool_name}/{self.short_name}"
        self.size_bytes = size_bytes
        self.open_count = 0
        self.policy_name = ""
        self.policy = DEFAULT
        self.policy_missing = False
        self.filling = False
        self.mirror_record = b""
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, size_bytes)
        self.id = os.fstat(self.fd).st_ino
        self.created_at = 0.0

    @property
    def shown_blocks(self) -> int:
        return self.mapped_bytes() // BLOCK_BYTES

    def acquire(self) -> None:
        self.open_count += 1

    def release(self) -> None:
        self.open_count -= 1

    def mapped_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        assert os.preadv(self.fd, [into], offset) == length
        return True

    def write_now(self, writes: list[tuple[int, memoryview]]) -> bool:
        for offset, data in writes:
            os.pwrite(self.fd, data, offset)
        return True

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.read_now(offset, length, into)

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        await trio.lowlevel.checkpoint()
        os.pwrite(self.fd, data, offset)

    async def flush(self) -> None:
        await trio.to_thread.run_sync(os.fdatasync, self.fd)

    def trim_now(self, ranges: list[tuple[int, int]]) -> bool:
        return False

    async def trim(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length, no_hole=False)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        os.pwrite(self.fd, bytes(length), offset)

    async def cache(self, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        await trio.lowlevel.checkpoint()
        return [(length, 0)]


class FakeSnapshot(FakeVolume):
    """A copy of a volume's file."""

    read_only = True

    def __init__(self, volume: FakeVolume, path: Path, size_bytes: int, known: Mapping[str, Any]) -> None:
        super().__init__(volume.name.partition("/")[0], path, size_bytes)
        self.short_name = self.short_name.partition("@")[2]
        self.volume = volume
        self.held: bool = known.get("held", False)
        self.created_at = known.get("created_at", 0.0)

    def known(self) -> dict[str, Any]:
        return {"size": self.size_bytes, "held": self.held, "created_at": self.created_at}


class FakeScrubber:
    """The interface of `tiers.scrub.Scrubber`, over the bytes that the volumes' files have."""

    def __init__(self, pool: FakePool, directory: Path) -> None:
        self._pool = pool
        self._directory = directory
        self._path = directory / "scrub.fake"
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        last = known.get("last")
        self._since: float = known.get("since", time.time())
        self._state: str = known.get("state", "never")
        self._state = "interrupted" if self._state == "running" else self._state
        self._scheduled: bool = known.get("scheduled", False)
        self._rate: int = known.get("rate", 0)
        self._times: tuple[float | None, float | None] = tuple(known.get("times", (None, None)))
        self._share: float = known.get("share", 0.0)
        self._damage = [Damage(**item) for item in known.get("damage", [])]
        self._last = Result(**last) if last else None
        self.save()

    def save(self) -> None:
        known = {
            "since": self._since,
            "state": self._state,
            "scheduled": self._scheduled,
            "rate": self._rate,
            "times": self._times,
            "share": self._share,
            "damage": [dataclasses.asdict(item) for item in self._damage],
            "last": self._last and dataclasses.asdict(self._last),
        }
        self._path.write_text(json.dumps(known))

    @property
    def running(self) -> bool:
        return self._state == "running"

    async def run(self) -> None:
        step_s = 0.02
        while True:
            await trio.sleep(step_s)
            if self._state != "running":
                continue
            slow = self._directory / "slow-scrub"
            self._share += step_s / float(slow.read_text()) if slow.exists() else 1
            if self._share >= 1:
                self._finish()

    def _finish(self) -> None:
        rot = self._directory / "rot"
        if rot.exists():
            device = str(self._pool.status().devices[0].path)
            self._damage = [
                Damage(
                    "data", f"{self._pool.name}/{rot.read_text()}", 0, BLOCK_BYTES, device, MIB, 1, "fails its checksum"
                )
            ]
        started_s, now_s = self._times[0] or 0.0, time.time()
        self._state, self._share, self._times = "finished", 1.0, (started_s, now_s)
        self._last = Result(started_s, now_s, now_s - started_s, self._total_bytes(), len(self._damage))
        self.save()

    def _total_bytes(self) -> int:
        return sum(volume.mapped_bytes() for volume in self._pool.volumes())

    async def start(self, rate: int | None = None, *, scheduled: bool = False) -> ScrubStatus:
        await trio.lowlevel.checkpoint()
        if rate is not None and 0 < rate < 65536:
            raise TierError(errno.EINVAL, f"a scrub can't be held to {rate} bytes a second: give at least 64K, or 0")
        if self._state in ("never", "stopped", "finished"):
            self._share, self._times, self._damage = 0.0, (time.time(), None), []
            self._scheduled, self._rate = scheduled, self._pool.settings.scrub_rate_bytes
        self._state = "running"
        self._scheduled = self._scheduled and scheduled
        self._rate = self._rate if rate is None else rate
        self.save()
        return self.status()

    async def pause(self, *, waiting: bool = False) -> ScrubStatus:
        self._require("running") if waiting else self._require("running", "waiting", "interrupted")
        return await self._halt("waiting" if waiting else "paused")

    async def stop(self) -> ScrubStatus:
        self._require("running", "paused", "waiting", "interrupted")
        self._times = (self._times[0], time.time())
        return await self._halt("stopped")

    def _require(self, *states: str) -> None:
        if self._state not in states:
            name = self._pool.name
            raise TierError(
                errno.ENOENT, f"no scrub of pool {name} is running: see `terrace pool scrub {name} --status`"
            )

    async def _halt(self, state: str) -> ScrubStatus:
        await trio.lowlevel.checkpoint()
        self._state = state
        self.save()
        return self.status()

    def status(self, most_damage: int | None = None) -> ScrubStatus:
        total = 0 if self._state == "never" else self._total_bytes()
        done = int(total * min(1.0, self._share))
        devices = [DeviceScrub(d["path"], 0, 0, 0) for d in self._pool.devices]  # type: ignore[arg-type]
        if devices:
            devices[0] = DeviceScrub(devices[0].path, done, total, len(self._damage))
        return ScrubStatus(
            self._state,  # type: ignore[arg-type]
            self._scheduled,
            *self._times,
            self._last.active_s if self._last else 0.0,
            self._rate,
            done,
            total,
            0.0,
            1.0 if self._state == "running" else None,
            len(self._damage),
            devices if self._state != "never" else [],
            self._damage[:most_damage],
            0,
            self._last,
            self._since,
        )


class FakeEvacuator:
    """The interface of `tiers.evacuate.Evacuator`: devices are empty, unless a file `slow-evacuation` is there."""

    def __init__(self, pool: FakePool, directory: Path) -> None:
        self._pool = pool
        self._slow = directory / "slow-evacuation"
        self._runs: dict[str, EvacuationStatus] = {}

    def begin(self, path: str, *, lost: bool) -> EvacuationStatus:
        now = time.time()
        total = 0 if lost else 1 << 20
        status = EvacuationStatus(path, "running", lost, now, None, 0, total, 0.0, None, 0, None)
        self._runs[path] = status
        return status

    def _device(self, path: str) -> dict[str, object]:
        for device in self._pool.devices:
            if device["path"] == path:
                return device
        raise TierError(errno.ENOENT, f"the pool {self._pool.name} has no device {path}")

    async def start(self, path: str) -> EvacuationStatus:
        await trio.lowlevel.checkpoint()
        self._device(path)
        if len(self._pool.devices) == 1:
            raise TierError(errno.EINVAL, f"{path} is the last device of pool {self._pool.name}")
        if path in self._runs and self._runs[path].state == "running":
            return self._runs[path]
        return self.begin(path, lost=False)

    async def cancel(self, path: str) -> EvacuationStatus:
        await trio.lowlevel.checkpoint()
        self._device(path)
        if path not in self._runs or self._runs[path].state != "running":
            raise TierError(errno.ENOENT, f"{path} is not being evacuated")
        self._runs[path] = dataclasses.replace(self._runs[path], state="cancelled", finished_at=time.time())
        return self._runs[path]

    def status(self) -> list[EvacuationStatus]:
        return list(self._runs.values())

    async def run(self) -> None:
        while True:
            await trio.sleep(0.02)
            for path, run in list(self._runs.items()):
                if run.state == "running" and not self._slow.exists():
                    self._runs[path] = dataclasses.replace(
                        run, state="removed", finished_at=time.time(), done_bytes=run.total_bytes
                    )
                    self._pool.forget(path)


class FakePool:
    """The interface of `tiers.Pool`."""

    def __init__(self, directory: Path, settings: PoolSettings) -> None:
        self._directory = directory
        self.settings = settings
        self.problem: str | None = None
        """Why it takes no writes any more."""
        self.no_writes: str | None = None
        catalog = json.loads((directory / "fake.json").read_text())
        self.name: str = catalog["name"]
        self.uuid: str = catalog["uuid"]
        self._given_up: str | None = None
        self._devices: list[dict[str, object]] = catalog["devices"]
        self._volumes = {
            name: FakeVolume(self.name, directory / f"{name}.raw", size) for name, size in catalog["volumes"].items()
        }
        for name, policy in catalog.get("policies", {}).items():
            self._volumes[name].policy_name = policy
        for name in catalog.get("filling", ()):
            self._volumes[name].filling = True
        self._policies: dict[str, Policy] = {}
        self._origins: dict[str, str] = catalog.get("origins", {})
        self._snapshots = {
            name: FakeSnapshot(
                self._volumes[name.partition("@")[0]], directory / f"{name}.raw", int(known["size"]), known
            )
            for name, known in catalog.get("snapshots", {}).items()
        }
        self.scrubber = FakeScrubber(self, directory)
        self.evacuator = FakeEvacuator(self, directory)

    @property
    def given_up(self) -> str | None:
        return self._given_up

    def forget(self, path: str) -> None:
        self._devices[:] = [device for device in self._devices if device["path"] != path]
        self._save()

    async def losses(self) -> list[Loss]:
        await trio.lowlevel.checkpoint()
        return []

    def lost_blocks(self) -> dict[str, int]:
        lost = self._directory / "lost"
        return json.loads(lost.read_text()) if lost.exists() else {}

    def use(self) -> tuple[int, int]:
        status = self.status()
        return status.used_bytes, status.capacity_bytes

    @property
    def devices(self) -> list[dict[str, object]]:
        return self._devices

    @classmethod
    async def create(cls, directory: Path, name: str, devices: Sequence[DeviceSpec], *, force: bool = False) -> None:
        validate_name("pool", name)
        await trio.lowlevel.checkpoint()
        if not devices:
            raise TierError(errno.EINVAL, "a pool needs at least one device")
        made = _prepare(devices)
        catalog = {"name": name, "uuid": str(uuid.uuid4()), "devices": made, "volumes": {}}
        directory.mkdir(exist_ok=True)
        (directory / "fake.json").write_text(json.dumps(catalog))

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        directory: Path,
        *,
        settings: PoolSettings | None = None,
        truncate_log: bool = False,
        give_up: Sequence[str] = (),
        give_up_map: bool = False,
        events: Callable[[str, str, str], None] = lambda kind, subject, text: None,
    ) -> AsyncIterator[FakePool]:
        await trio.lowlevel.checkpoint()
        if (directory / "slow-open").exists():
            await trio.sleep(float((directory / "slow-open").read_text()))
        if (once := directory / "one-slow-open").exists():
            seconds = float(once.read_text())
            once.unlink()
            await trio.sleep(seconds)
        given_up = None
        if truncate_log and (directory / "bad-log").exists():
            (directory / "bad-log").unlink()
            given_up = "given up: all after sequence 41"
        if (directory / "bad-log").exists():
            raise TierError(errno.EIO, "the log is damaged: `terrace pool check --truncate-log` gives up what follows")
        if (directory / "fail-open").exists():
            raise TierError(errno.EIO, (directory / "fail-open").read_text())
        if (once := directory / "fail-one-open").exists():
            cause = once.read_text()
            once.unlink()
            raise TierError(errno.EIO, cause)
        if not (directory / "fake.json").exists():
            raise TierError(errno.ENOENT, f"{directory} holds no pool")
        with (directory / "fake.json").open() as catalog:
            try:
                fcntl.flock(catalog, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TierError(errno.EBUSY, f"the pool in {directory} is open in another process") from None
            pool = cls(directory, settings or PoolSettings())
            pool._given_up = given_up
            for path in give_up:
                if Path(path).exists():
                    raise TierError(errno.EEXIST, f"{path} is there: evacuate it without --lost")
                pool.evacuator.begin(path, lost=True)
            missing = [
                d["path"] for d in pool.devices if not Path(str(d["path"])).exists() and d["path"] not in give_up
            ]
            if missing:
                raise TierError(errno.ENOENT, f"the device {missing[0]} is missing")
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool._fail_later)
                    nursery.start_soon(pool.scrubber.run)
                    nursery.start_soon(pool.evacuator.run)
                    yield pool
                    nursery.cancel_scope.cancel()
                if (directory / "stuck-close").exists():
                    await trio.sleep(float((directory / "stuck-close").read_text()))
                (directory / "closed-cleanly").touch()
            finally:
                for volume in (*pool._volumes.values(), *pool._snapshots.values()):
                    os.close(volume.fd)

    @classmethod
    async def destroy(cls, directory: Path) -> None:
        await trio.lowlevel.checkpoint()
        shutil.rmtree(directory)

    async def _fail_later(self) -> None:
        cause = self._directory / "fail-later"
        while not cause.exists():
            await trio.sleep(0.02)
        raise TierError(errno.EIO, cause.read_text())

    def _save(self) -> None:
        catalog = {
            "name": self.name,
            "uuid": self.uuid,
            "devices": self._devices,
            "volumes": {volume.short_name: volume.size_bytes for volume in self._volumes.values()},
            "policies": {volume.short_name: volume.policy_name for volume in self._volumes.values()},
            "filling": [volume.short_name for volume in self._volumes.values() if volume.filling],
            "origins": self._origins,
            "snapshots": {name: snapshot.known() for name, snapshot in self._snapshots.items()},
        }
        # In place: the lock is on this very file.
        (self._directory / "fake.json").write_text(json.dumps(catalog))

    def volumes(self) -> list[FakeVolume]:
        return list(self._volumes.values())

    def volume(self, name: str) -> FakeVolume:
        if name not in self._volumes:
            raise TierError(errno.ENOENT, f"the pool {self.name} has no volume {name!r}")
        return self._volumes[name]

    def define_policies(self, policies: Mapping[str, Policy]) -> None:
        self._policies = dict(policies)
        for volume in self.volumes():
            self._apply_policy(volume)

    def _apply_policy(self, volume: FakeVolume) -> None:
        default = self._policies.get("default", DEFAULT)
        volume.policy = self._policies.get(volume.policy_name, default) if volume.policy_name else default
        volume.policy_missing = volume.policy_name not in ("", *self._policies)

    def _require_policy(self, name: str) -> str:
        if name in ("", "default"):
            return ""
        if name not in self._policies:
            raise TierError(errno.ENOENT, f"there is no policy {name!r}")
        return name

    async def set_policy(self, name: str, policy: str) -> FakeVolume:
        volume = self.volume(name)
        await trio.lowlevel.checkpoint()
        volume.policy_name = self._require_policy(policy)
        self._apply_policy(volume)
        self._save()
        return volume

    async def set_filling(self, name: str, filling: bool) -> FakeVolume:
        volume = self.volume(name)
        await trio.lowlevel.checkpoint()
        volume.filling = filling
        self._save()
        return volume

    async def create_volume(self, name: str, size_bytes: int, policy: str = "", *, filling: bool = False) -> FakeVolume:
        validate_name("volume", name)
        validate_volume_size(size_bytes)
        await trio.lowlevel.checkpoint()
        if name in self._volumes:
            raise TierError(errno.EEXIST, f"{self.name}/{name} exists already")
        policy = self._require_policy(policy)
        self._volumes[name] = FakeVolume(self.name, self._directory / f"{name}.raw", size_bytes)
        self._volumes[name].policy_name = policy
        self._volumes[name].filling = filling
        self._apply_policy(self._volumes[name])
        self._save()
        return self._volumes[name]

    async def resize_volume(self, name: str, size_bytes: int) -> FakeVolume:
        volume = self.volume(name)
        validate_volume_size(size_bytes)
        await trio.lowlevel.checkpoint()
        if volume.open_count and size_bytes < volume.size_bytes:
            raise TierError(errno.EBUSY, f"{volume.name} is in use")
        os.ftruncate(volume.fd, size_bytes)
        volume.size_bytes = size_bytes
        self._save()
        return volume

    async def heat_map(self, name: str, ranges: int) -> HeatMap:
        volume = self.volume(name)
        await trio.lowlevel.checkpoint()
        extents = -(-volume.size_bytes // 65536)
        count = min(ranges, extents)
        range_bytes = -(-extents // count) * 65536
        count = -(-volume.size_bytes // range_bytes)
        mapped = volume.mapped_bytes() // count
        rising = [float(i) for i in range(count)]
        return HeatMap(
            volume.name,
            volume.size_bytes,
            range_bytes,
            3600.0,
            1.0,
            [mapped] * count,
            [0] * count,
            [i / 4 if mapped else 0.0 for i in rising],
            [0.0] * count,
            rising,
            rising[::-1],
        )

    async def delete_volume(self, name: str, *, snapshots: bool = False) -> None:
        volume = self.volume(name)
        await trio.lowlevel.checkpoint()
        self._require_unused(volume)
        family = self.snapshots(name)
        if family and not snapshots:
            raise TierError(errno.EBUSY, f"{volume.name} has {len(family)} snapshot(s): delete them first")
        for snapshot in family:
            self._require_free(snapshot)
        for snapshot in family:
            self._remove_snapshot(snapshot)
        del self._volumes[name]
        self._origins.pop(name, None)
        os.close(volume.fd)
        volume.path.unlink()
        self._save()

    @staticmethod
    def _require_unused(volume: FakeVolume) -> None:
        if volume.open_count:
            raise TierError(errno.EBUSY, f"{volume.name} is in use")

    def _require_free(self, snapshot: FakeSnapshot) -> None:
        self._require_unused(snapshot)
        if snapshot.held:
            raise TierError(errno.EBUSY, f"{snapshot.name} is held: release it")

    def _remove_snapshot(self, snapshot: FakeSnapshot) -> None:
        del self._snapshots[f"{snapshot.volume.short_name}@{snapshot.short_name}"]
        self._origins = {clone: origin for clone, origin in self._origins.items() if origin != snapshot.name}
        os.close(snapshot.fd)
        snapshot.path.unlink()

    def snapshots(self, volume: str | None = None) -> list[FakeSnapshot]:
        wanted = None if volume is None else self.volume(volume)
        found = [snapshot for snapshot in self._snapshots.values() if wanted in (None, snapshot.volume)]
        return sorted(found, key=lambda snapshot: (snapshot.volume.name, snapshot.created_at))

    def snapshot(self, volume: str, name: str) -> FakeSnapshot:
        self.volume(volume)
        if f"{volume}@{name}" not in self._snapshots:
            raise TierError(errno.ENOENT, f"{self.name}/{volume} has no snapshot {name!r}")
        return self._snapshots[f"{volume}@{name}"]

    async def snapshot_status(self, volume: str | None = None, name: str | None = None) -> list[SnapshotStatus]:
        await trio.lowlevel.checkpoint()
        if volume is not None and name is not None:
            found = [self.snapshot(volume, name)]
        else:
            found = self.snapshots(volume)
        return [self._snapshot_status(snapshot) for snapshot in found]

    def _snapshot_status(self, snapshot: FakeSnapshot) -> SnapshotStatus:
        clones = [f"{self.name}/{clone}" for clone, origin in self._origins.items() if origin == snapshot.name]
        exclusive = 0 if clones else snapshot.mapped_bytes() // 2
        return SnapshotStatus(
            snapshot.name,
            snapshot.volume.name,
            snapshot.short_name,
            1,
            snapshot.size_bytes,
            snapshot.mapped_bytes(),
            exclusive,
            snapshot.mapped_bytes() - exclusive,
            snapshot.created_at,
            snapshot.held,
            snapshot.open_count,
            clones,
        )

    def _copy(self, source: FakeVolume, name: str) -> Path:
        path = self._directory / f"{name}.raw"
        os.fsync(source.fd)
        shutil.copyfile(source.path, path)
        return path

    async def take_snapshots(self, wanted: Sequence[tuple[str, str]], *, by_filler: bool = False) -> list[FakeSnapshot]:
        await trio.lowlevel.checkpoint()
        for volume, name in wanted:
            validate_name("snapshot", name)
            self.volume(volume)
            if f"{volume}@{name}" in self._snapshots:
                raise TierError(errno.EEXIST, f"there is a snapshot {self.name}/{volume}@{name} already")
            if not by_filler:
                self._require_complete(self.volume(volume))
        if len(set(wanted)) < len(wanted):
            raise TierError(errno.EINVAL, "a volume is named twice")
        return [self._take(self.volume(volume), name) for volume, name in wanted]

    @staticmethod
    def _require_complete(volume: FakeVolume) -> None:
        if volume.filling:
            raise TierError(errno.EBUSY, f"{volume.name} is being filled and not complete")

    def _take(self, volume: FakeVolume, name: str) -> FakeSnapshot:
        full_name = f"{volume.short_name}@{name}"
        path = self._copy(volume, full_name)
        snapshot = FakeSnapshot(volume, path, volume.size_bytes, {"created_at": time.time()})
        self._snapshots[full_name] = snapshot
        self._save()
        return snapshot

    async def delete_snapshot(self, volume: str, name: str) -> None:
        await self.delete_snapshots([(volume, name)])

    async def delete_snapshots(self, wanted: Sequence[tuple[str, str]]) -> None:
        await trio.lowlevel.checkpoint()
        found = [self.snapshot(volume, name) for volume, name in wanted]
        for snapshot in found:
            self._require_free(snapshot)
        for snapshot in found:
            self._remove_snapshot(snapshot)
        self._save()

    async def change_snapshot(
        self, volume: str, name: str, *, new_name: str | None = None, held: bool | None = None
    ) -> FakeSnapshot:
        if new_name is not None:
            validate_name("snapshot", new_name)
        await trio.lowlevel.checkpoint()
        snapshot = self.snapshot(volume, name)
        if new_name is not None and new_name != name:
            if f"{volume}@{new_name}" in self._snapshots:
                raise TierError(errno.EEXIST, f"there is a snapshot {self.name}/{volume}@{new_name} already")
            del self._snapshots[f"{volume}@{name}"]
            self._snapshots[f"{volume}@{new_name}"] = snapshot
            snapshot.path = snapshot.path.rename(self._directory / f"{volume}@{new_name}.raw")
            snapshot.short_name, snapshot.name = new_name, f"{self.name}/{volume}@{new_name}"
        snapshot.held = snapshot.held if held is None else held
        self._save()
        return snapshot

    async def clone(self, volume: str, name: str, new_volume: str, policy: str = "") -> FakeVolume:
        validate_name("volume", new_volume)
        await trio.lowlevel.checkpoint()
        snapshot = self.snapshot(volume, name)
        if new_volume in self._volumes:
            raise TierError(errno.EEXIST, f"{self.name}/{new_volume} exists already")
        policy = self._require_policy(policy)
        path = self._copy(snapshot, new_volume)
        made = self._volumes[new_volume] = FakeVolume(self.name, path, snapshot.size_bytes)
        made.policy_name = policy
        self._apply_policy(made)
        self._origins[new_volume] = snapshot.name
        self._save()
        return made

    async def promote(self, name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> FakeVolume:
        volume = self.volume(name)
        progress(0, volume.size_bytes)
        await trio.lowlevel.checkpoint()
        if name not in self._origins:
            raise TierError(errno.EINVAL, f"{volume.name} is no clone")
        if self.snapshots(name):
            raise TierError(errno.EBUSY, f"{volume.name} has snapshots")
        del self._origins[name]
        self._save()
        return volume

    async def rollback(self, volume: str, name: str, *, keep_as: str | None, force: bool = False) -> FakeVolume:
        if keep_as is not None:
            validate_name("snapshot", keep_as)
        await trio.lowlevel.checkpoint()
        snapshot, there = self.snapshot(volume, name), self.volume(volume)
        if not force:
            self._require_unused(there)
        if keep_as is not None:
            if f"{volume}@{keep_as}" in self._snapshots:
                raise TierError(errno.EEXIST, f"there is a snapshot {there.name}@{keep_as} already")
            self._require_complete(there)
            self._take(there, keep_as)
        there.filling = False
        there.size_bytes = snapshot.size_bytes
        os.ftruncate(there.fd, there.size_bytes)
        os.pwrite(there.fd, snapshot.path.read_bytes(), 0)
        self._origins[volume] = snapshot.name
        self._save()
        return there

    async def grow(self, devices: Sequence[DeviceSpec], *, force: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._devices += _prepare(devices)
        self._save()

    async def checkpoint(self) -> None:
        slow = self._directory / "slow-checkpoint"
        await trio.sleep(float(slow.read_text()) if slow.exists() else 0)

    async def check(self, full: bool, progress: Callable[[int, int], None]) -> CheckReport:
        used_bytes = sum(volume.mapped_bytes() for volume in self.volumes())
        slow = self._directory / "slow-check"
        steps = 20 if slow.exists() else 1
        total_bytes = used_bytes + (1 << 20)  # the map, say
        for step in range(steps):
            progress(total_bytes * step // steps, total_bytes)
            await trio.sleep(float(slow.read_text()) / steps if slow.exists() else 0)
        progress(total_bytes, total_bytes)
        return CheckReport(
            ok=True,
            problems=[],
            volumes=len(self._volumes),
            blocks_mapped=used_bytes // BLOCK_BYTES,
            bytes_checked=used_bytes,
        )

    def status(self) -> PoolStatus:
        volumes = [
            VolumeStatus(
                volume.name,
                volume.size_bytes,
                volume.mapped_bytes(),
                volume.open_count,
                volume.policy_name or "default",
                volume.policy_missing,
                origin=self._origins.get(volume.short_name),
                snapshots=len(self.snapshots(volume.short_name)),
                referenced_bytes=volume.mapped_bytes(),
                filling=volume.filling,
            )
            for volume in self.volumes()
        ]
        used_bytes = sum(volume.mapped_bytes for volume in volumes)
        capacity_bytes = sum(int(str(device["size"])) for device in self._devices)
        numbers = dict.fromkeys((field.name for field in dataclasses.fields(PoolStatus)), 0)
        known = {
            "name": self.name,
            "uuid": self.uuid,
            "state": "read-only" if self.problem else "online",
            "problem": self.problem,
            "checkpoint_failure": None,
            "given_up": self._given_up,
            "block_size": BLOCK_BYTES,
            "size_bytes": capacity_bytes,
            "capacity_bytes": capacity_bytes,
            "used_bytes": used_bytes,
            "available_bytes": capacity_bytes - used_bytes,
            "nominal_bytes": sum(volume.size_bytes for volume in volumes),
            "scrub": self.scrubber.status(10),
            "evacuations": self.evacuator.status(),
            "losses": [],
            "hit_ratio": None,
            "devices": [self._device_status(device) for device in self._devices],
            "volumes": volumes,
        }
        return PoolStatus(**(numbers | known))  # type: ignore[arg-type]

    def _device_status(self, device: dict[str, object]) -> DeviceStatus:
        size_bytes = int(str(device["size"]))
        known = {
            "path": str(device["path"]),
            "tier": str(device["tier"]),
            "uuid": self.uuid,
            "size_bytes": size_bytes,
            "segment_bytes": 1 << 20,
            "segments": size_bytes >> 20,
            "free_segments": size_bytes >> 20,
            "live_bytes": 0,
            "state": "online",
            "errors": 0,
        }
        return DeviceStatus(**known)  # type: ignore[arg-type]


def _prepare(devices: Sequence[DeviceSpec]) -> list[dict[str, object]]:
    prepared: list[dict[str, object]] = []
    for device in devices:
        if device.create_size_bytes is None and not device.path.exists():
            raise TierError(errno.ENOENT, f"{device.path} does not exist; {device.path}=SIZE makes a sparse file")
        if device.create_size_bytes is not None:
            if device.path.exists():
                raise TierError(errno.EEXIST, f"{device.path} exists already")
            if device.create_size_bytes < MIN_DEVICE_BYTES:
                raise TierError(errno.EINVAL, f"{device.path} would be too small")
            device.path.touch()
            os.truncate(device.path, device.create_size_bytes)
        prepared.append({"path": str(device.path), "tier": device.tier, "size": device.path.stat().st_size})
    return prepared
