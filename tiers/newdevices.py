"""Making devices: what a path is made of and judged by before it becomes part of a pool, and how its label is wiped.

All devices of a call are checked before one is labelled, and a failure takes labels and new files back.
"""

import contextlib
import errno
import os
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiers.catalog import DeviceRow, sync_directory
from tiers.device import erase_labels, lock_or_refuse
from tiers.errors import TierError
from tiers.label import LABEL_OFFSETS, MAX_DEVICES, Label, Tier, encode_label
from tiers.layout import LABEL_AREA_BYTES, MIN_DEVICE_BYTES, segment_bytes_for
from tiers.probe import check_usable, size_of


@dataclass(frozen=True)
class DeviceSpec:
    """A device for a new or growing pool. `create_size_bytes`: make a sparse file of that size."""

    path: Path
    tier: Tier
    create_size_bytes: int | None = None


def label_devices(
    name: str, pool_uuid: bytes, specs: list[DeviceSpec], first_index: int, present: list[Path], force: bool
) -> list[DeviceRow]:
    """Check all devices, then label all. Files that this made are removed again if it fails."""
    if first_index + len(specs) > MAX_DEVICES:
        raise TierError(errno.EINVAL, f"a pool has at most {MAX_DEVICES} devices, those that it had before included")
    made: list[Path] = []
    locked: list[int] = []
    labelled: list[Path] = []
    try:
        seen = {path.resolve(): path for path in present}
        for spec in specs:
            real = spec.path.resolve()
            if seen.get(real) in present:
                raise TierError(errno.EEXIST, f"{spec.path} belongs to the pool {name} already")
            if real in seen:
                raise TierError(errno.EINVAL, f"{spec.path} is listed twice: give each device once")
            seen[real] = spec.path
            _make_or_check(spec, made, force)
        sizes = []
        for spec in specs:
            fd = os.open(spec.path, os.O_RDWR | os.O_CLOEXEC)
            locked.append(fd)
            lock_or_refuse(fd, str(spec.path))
            sizes.append(size_of(fd))
            if sizes[-1] < MIN_DEVICE_BYTES:
                raise TierError(
                    errno.EINVAL,
                    f"{spec.path} has {sizes[-1]} bytes: a device needs at least {MIN_DEVICE_BYTES} (32 MiB)",
                )
        rows = []
        for i, (spec, fd, size) in enumerate(zip(specs, locked, sizes, strict=True), first_index):
            segment_bytes = segment_bytes_for(size)
            label = Label(spec.tier, i, pool_uuid, uuids.uuid4().bytes, size, segment_bytes, 1, 0, frozenset(), name)
            labelled.append(spec.path)
            _write_first_label(fd, label)
            # Not resolved: /dev/disk/by-id/... stays the device's name when the kernel numbers disks anew.
            rows.append(
                DeviceRow(i, label.device_uuid, str(spec.path.absolute()), spec.tier, size, segment_bytes, None)
            )
        return rows
    except OSError as error:
        wipe_labels([labelled_path for labelled_path in labelled if labelled_path not in made])
        for made_path in made:
            made_path.unlink(missing_ok=True)
        if isinstance(error, TierError):
            raise
        raise TierError(error.errno or errno.EIO, f"{error.filename or name}: {error.strerror}") from error
    finally:
        for fd in locked:
            os.close(fd)


def _make_or_check(spec: DeviceSpec, made: list[Path], force: bool) -> None:
    if spec.create_size_bytes is not None:
        if spec.create_size_bytes < MIN_DEVICE_BYTES:
            raise TierError(errno.EINVAL, f"{spec.path}: a device needs at least {MIN_DEVICE_BYTES} bytes (32 MiB)")
        try:
            fd = os.open(spec.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise TierError(
                errno.EEXIST, f"{spec.path} exists: give it without =SIZE to use it as it is, or choose another path"
            ) from None
        except OSError as error:
            raise TierError(error.errno or errno.EIO, f"creating {spec.path}: {error.strerror}") from error
        made.append(spec.path)
        try:
            os.ftruncate(fd, spec.create_size_bytes)
            sync_directory(spec.path.resolve().parent)
        except OverflowError:
            raise TierError(
                errno.EFBIG, f"{spec.path} can't have {spec.create_size_bytes} bytes: files end before 8 EiB"
            ) from None
        except OSError as error:
            raise TierError(
                error.errno or errno.EIO, f"making {spec.path} {spec.create_size_bytes} bytes large: {error.strerror}"
            ) from error
        finally:
            os.close(fd)
        return
    if not spec.path.exists():
        raise TierError(errno.ENOENT, f"{spec.path} does not exist: to make a sparse file give {spec.path}=SIZE")
    check_usable(spec.path, force=force)


def _write_first_label(fd: int, label: Label) -> None:
    """Clear the label area (stale labels, old superblocks), write both copies, and make them durable."""
    os.pwrite(fd, bytes(LABEL_AREA_BYTES), 0)
    for offset in LABEL_OFFSETS:
        os.pwrite(fd, encode_label(label), offset)
    os.fsync(fd)


def wipe_labels(paths: Sequence[Path]) -> None:
    """Wipe what can be wiped."""
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                erase_labels(fd)
            finally:
                os.close(fd)
