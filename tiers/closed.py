"""What is in a pool that nobody has open, without opening it: nothing is recovered, and nothing is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tiers.catalog import Catalog, State
from tiers.host import locked
from tiers.layout import BLOCK_BYTES, LABEL_AREA_BYTES
from tiers.record import MAX_HEADER_SLOTS, BadRecordError, decode_batch


@dataclass(frozen=True)
class ClosedPool:
    """What the catalog of a closed pool tells."""

    name: str
    exports: set[str]
    """VOLUME and VOLUME@SNAPSHOT."""


def look_into_closed(directory: Path) -> ClosedPool | None:
    """The volumes and snapshots of a pool that was closed in order.

    None: something follows its last checkpoint, or that can't be told; who wants to know must open it. Blocks. Raises
    TierError as `Pool.open` does: ENOENT, EBUSY, and for a damaged catalog.
    """
    with locked(directory):
        catalog = Catalog(directory)
        try:
            state = catalog.load()
        finally:
            catalog.close()
        if _log_goes_on(state):
            return None
    heads = {row.family or row.id: row.name for row in state.volumes if not row.retired}
    families = {row.id: row.family or row.id for row in state.volumes}
    snapshots = [row for row in state.snapshots if row.state == "visible"]
    names = [f"{heads.get(families[row.volume])}@{row.name}" for row in snapshots]
    return ClosedPool(state.pool_name, {*heads.values(), *names})


def _log_goes_on(state: State) -> bool:
    """Whether a batch may stand where the catalog says that the log goes on."""
    position = state.position
    if not position.log_segment:
        return False  # no life has begun yet
    segment = next((row for row in state.segments if row.id == position.log_segment), None)
    device = next((row for row in state.devices if segment is not None and row.index == segment.device), None)
    if segment is None or device is None:
        return True
    in_segment = position.log_slot * BLOCK_BYTES
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        length = min(MAX_HEADER_SLOTS * BLOCK_BYTES, device.segment_bytes - in_segment)
        header = os.pread(fd, length, LABEL_AREA_BYTES + segment.index * device.segment_bytes + in_segment)
    except OSError:
        return True
    finally:
        os.close(fd)
    try:
        batch = decode_batch(header, state.pool_uuid, position.log_segment, position.log_slot)
    except BadRecordError as error:
        return error.newer
    return batch.incarnation == position.incarnation and batch.seq > position.checkpoint_seq
