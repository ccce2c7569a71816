"""The log: the one ordered stream of batches that every change of state goes through.

A batch is a header and its data blocks, appended at the head with one `pwritev`. Each header names the sequence and
the hash of the header before it, so the chain can be followed and nothing stale can slip into it. A full segment ends
with a LINK batch that names the next one; one slot is always kept for it.

A write that fails burns its sequence, enters no map and seals the segment. The head then moves to a fresh segment. If
the LINK to it can't be written either, what follows could not be found again, so the log is *broken* until a
checkpoint has recorded the new head.
"""

import errno
import logging
from collections.abc import Callable, Sequence

from tiers.device import Buffer, Device
from tiers.errors import TierError
from tiers.failpoint import hit
from tiers.layout import SLOT_BITS
from tiers.record import Kind, Op, encode_batch, encode_segment_header
from tiers.segments import Segment, SegmentTable

logger = logging.getLogger(__name__)

MAX_BATCH_BLOCKS = 1000
"""IOV_MAX is 1,024, each block may be a buffer of its own, and the header takes one."""


class Log:
    """The head of the log. Appending is synchronous: state that a batch describes may be changed in the same breath."""

    def __init__(self, segments: SegmentTable, pool_uuid: bytes, incarnation: int, seq: int, prev_check: int) -> None:
        self.seq = seq
        self.appended_seq = seq
        """The newest batch that is in the log. Behind `seq` where numbers were burned: no flush may claim those."""
        self.prev_check = prev_check
        self.incarnation = incarnation
        self.durable_seq: Callable[[], int] = lambda: 0
        self.checkpoint_seq = 0
        self.pick_device: Callable[[], Device | None] = lambda: None
        self.pick_first_device: Callable[[], Device | None] = lambda: None
        self.broken = False
        """A write failed and nothing tells a replay to go on elsewhere: no appends until a checkpoint does."""
        self.on_broken: Callable[[], None] = lambda: None
        self.appended_bytes = 0
        self._segments = segments
        self._uuid = pool_uuid
        self._head: Segment | None = None

    @property
    def head(self) -> Segment:
        """The open segment."""
        assert self._head is not None
        return self._head

    @property
    def head_room(self) -> int:
        """Slots that a batch may take before the segment must be left (one stays for the LINK)."""
        return 0 if self._head is None else self._head.slots - self._head.used - 1

    def open_segment(self, device: Device, kind: Kind) -> Segment:
        """Take a free segment and write its header."""
        segment = self._segments.take(device, kind)
        header = encode_segment_header(
            kind, device.index, self._uuid, segment.id, segment.index, self.incarnation, self.checkpoint_seq, self.seq
        )
        try:
            device.write(segment.base, [header])
        except OSError:
            self._segments.release(segment)  # nothing names it
            device.free.insert(0, device.free.pop())  # and others are tried before it
            raise
        hit("segment.opened")
        return segment

    def start(self) -> None:
        """Begin a life: open a fresh segment as head, without a LINK. The next checkpoint tells where it is."""
        device = self.pick_first_device()
        if device is None:
            raise TierError(errno.ENOSPC, "no segment is free for the log: grow the pool")
        self._head = self.open_segment(device, Kind.LOG)

    def roll(self) -> None:
        """Leave the head for a fresh segment: LINK, then seal. Raises ENOSPC if there is none."""
        device = self.pick_device()
        if device is None:
            raise TierError(errno.ENOSPC, "no segment is free for the log")
        old = self.head
        fresh = self.open_segment(device, Kind.LOG)
        link = [Op.LINK << 56 | fresh.id, fresh.device.index << 32 | fresh.index, 0]
        try:
            self._write(old, link, [], [], [])
        except OSError as error:
            logger.error("the log can't be continued from segment %d: %s; a checkpoint must come first", old.id, error)
            self._break()
        old.open = False
        old.last_seq = self.seq  # the chain passes through it, even if it holds nothing else
        self._segments.changed.add(old.id)
        self._head = fresh
        hit("log.rolled")

    def append(
        self, ops: list[int], checks: list[int], buffers: Sequence[Buffer], extra: list[int] | None = None
    ) -> int:
        """Append one batch; return the address of its first data block. It must fit `head_room` (see `fit`).

        Raises TierError; then the batch is in no map and never will be.
        """
        if self.broken:
            raise TierError(errno.EIO, "the log is waiting for a checkpoint after a failed write")
        segment = self.head
        try:
            address = self._write(segment, ops, checks, buffers, extra or [])
        except OSError:
            self._leave_damaged_head()
            raise
        segment.last_seq = self.seq
        return address

    def _write(
        self, segment: Segment, ops: list[int], checks: list[int], buffers: Sequence[Buffer], extra: list[int]
    ) -> int:
        slot = segment.used
        seq = self.seq = self.seq + 1  # burned if the write fails
        header, check = encode_batch(
            Kind.LOG,
            self._uuid,
            segment.id,
            slot,
            self.incarnation,
            seq,
            self.prev_check,
            self.durable_seq(),
            ops,
            checks,
            extra,
        )
        segment.device.write(segment.offset(slot), [header, *buffers])
        self.appended_seq = seq
        slots = len(header) >> 12
        segment.used = slot + slots + len(checks)
        self.prev_check = check
        self.appended_bytes += (slots + len(checks)) << 12
        return segment.id << SLOT_BITS | (slot + slots)

    def _leave_damaged_head(self) -> None:
        hit("log.damaged")
        try:
            self.roll()
        except OSError as error:
            logger.error("no log segment can be opened: %s", error)
            self._break()

    def _break(self) -> None:
        self.broken = True
        self.on_broken()
