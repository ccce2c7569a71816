"""A pool without an engine: sparse files, one per volume. For tests of the application that need no storage engine.

`test_pool_contract.py` runs one suite over this and over `tiers.Pool`, so that what the application learns here is
true there. What the real one does only in bad luck, this one does on demand, by a file in the pool's directory:

    fail-open       opening raises its text as EIO
    bad-log         opening raises EIO unless the log may be truncated
    slow-open       opening takes as many seconds as its text says
    fail-later      once the file appears, the running pool fails with its text
    slow-check      a check takes as many seconds as its text says, with progress
    stuck-close     closing takes as many seconds as its text says
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from tiers import CheckReport, DeviceSpec, DeviceStatus, PoolSettings, PoolStatus, TierError, VolumeStatus
from tiers.names import validate_name, validate_volume_size

BLOCK_BYTES = 4096
MIN_DEVICE_BYTES = 32 << 20


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
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, size_bytes)

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


class FakePool:
    """The interface of `tiers.Pool`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        catalog = json.loads((directory / "fake.json").read_text())
        self.name: str = catalog["name"]
        self.uuid: str = catalog["uuid"]
        self._given_up: str | None = None
        self._devices: list[dict[str, object]] = catalog["devices"]
        self._volumes = {
            name: FakeVolume(self.name, directory / f"{name}.raw", size) for name, size in catalog["volumes"].items()
        }

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
        cls, directory: Path, *, settings: PoolSettings | None = None, truncate_log: bool = False
    ) -> AsyncIterator[FakePool]:
        await trio.lowlevel.checkpoint()
        if (directory / "slow-open").exists():
            await trio.sleep(float((directory / "slow-open").read_text()))
        given_up = None
        if truncate_log and (directory / "bad-log").exists():
            (directory / "bad-log").unlink()
            given_up = "given up: all after sequence 41"
        if (directory / "bad-log").exists():
            raise TierError(errno.EIO, "the log is damaged: `terrace pool check --truncate-log` gives up what follows")
        if (directory / "fail-open").exists():
            raise TierError(errno.EIO, (directory / "fail-open").read_text())
        if not (directory / "fake.json").exists():
            raise TierError(errno.ENOENT, f"{directory} holds no pool")
        with (directory / "fake.json").open() as catalog:
            try:
                fcntl.flock(catalog, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TierError(errno.EBUSY, f"the pool in {directory} is open in another process") from None
            pool = cls(directory)
            pool._given_up = given_up
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool._fail_later)
                    yield pool
                    nursery.cancel_scope.cancel()
                if (directory / "stuck-close").exists():
                    await trio.sleep(float((directory / "stuck-close").read_text()))
                (directory / "closed-cleanly").touch()
            finally:
                for volume in pool._volumes.values():
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
        }
        # In place: the lock is on this very file.
        (self._directory / "fake.json").write_text(json.dumps(catalog))

    def volumes(self) -> list[FakeVolume]:
        return list(self._volumes.values())

    def volume(self, name: str) -> FakeVolume:
        if name not in self._volumes:
            raise TierError(errno.ENOENT, f"the pool {self.name} has no volume {name!r}")
        return self._volumes[name]

    async def create_volume(self, name: str, size_bytes: int) -> FakeVolume:
        validate_name("volume", name)
        validate_volume_size(size_bytes)
        await trio.lowlevel.checkpoint()
        if name in self._volumes:
            raise TierError(errno.EEXIST, f"{self.name}/{name} exists already")
        self._volumes[name] = FakeVolume(self.name, self._directory / f"{name}.raw", size_bytes)
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

    async def delete_volume(self, name: str) -> None:
        volume = self.volume(name)
        await trio.lowlevel.checkpoint()
        if volume.open_count:
            raise TierError(errno.EBUSY, f"{volume.name} is in use")
        del self._volumes[name]
        os.close(volume.fd)
        volume.path.unlink()
        self._save()

    async def grow(self, devices: Sequence[DeviceSpec], *, force: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._devices += _prepare(devices)
        self._save()

    async def checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()

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
            VolumeStatus(volume.name, volume.size_bytes, volume.mapped_bytes(), volume.open_count)
            for volume in self.volumes()
        ]
        used_bytes = sum(volume.mapped_bytes for volume in volumes)
        capacity_bytes = sum(int(str(device["size"])) for device in self._devices)
        numbers = dict.fromkeys((field.name for field in dataclasses.fields(PoolStatus)), 0)
        known = {
            "name": self.name,
            "uuid": self.uuid,
            "state": "online",
            "problem": None,
            "checkpoint_failure": None,
            "given_up": self._given_up,
            "block_size": BLOCK_BYTES,
            "size_bytes": capacity_bytes,
            "capacity_bytes": capacity_bytes,
            "used_bytes": used_bytes,
            "available_bytes": capacity_bytes - used_bytes,
            "nominal_bytes": sum(volume.size_bytes for volume in volumes),
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
