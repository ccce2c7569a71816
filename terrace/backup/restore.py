"""Restoring: a full stream and its increments, in order, onto a volume of which it is known what it holds.

An increment applied to anything but its base gives a volume that never existed. So a target's state is kept where it
can't come apart from the target: behind each stream that was applied as a whole a snapshot of the target is taken, the
*marker*, whose name carries a digest of the identity of what was restored. A further increment is applied only if the
newest marker is that of its base and the target has not changed since. From before the first byte until all streams
were applied the target bears the engine's mark that it is being filled, so whatever ends a restore leaves a volume that
says itself that it is not complete.

What a failure leaves:

- Nothing, if the streams' headers don't fit each other or the target: all are judged before the first byte is written.
- A part of one stream, if that is damaged or the target fails: no marker is made, so no increment will be applied to
  it, the error says that it is incomplete, and so does the volume. It is left there: of a damaged backup it may be all
  that is left. Nothing is restored onto it before it is rolled back to a marker.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio
import xxhash

from terrace.backup.errors import BackupError, alone
from terrace.backup.stream import Data, Header, Record, Snapshot, StreamReader, Totals, time_text

IN_FLIGHT = 8
_BATCH_BYTES = 1 << 20
_BATCH_RECORDS = 256
_LABEL_LIMIT = 38
_MARKER = re.compile(r"restored-(?P<digest>[0-9a-f]{16})-(?P<label>.+)")
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]")


class Target(Protocol):
    """A volume that is being written."""

    async def write(self, offset: int, data: bytes) -> None: ...

    async def write_zeroes(self, offset: int, length: int) -> None: ...

    async def flush(self) -> None: ...


class Destination(Protocol):
    """A volume that streams are restored onto."""

    def open(self, size_bytes: int) -> AbstractAsyncContextManager[Target]:
        """The volume, made so large."""


@dataclass(frozen=True, slots=True)
class Marker:
    """Says which snapshot a target was restored to: `label` for people, `digest` for comparing."""

    digest: str
    label: str

    @classmethod
    def of(cls, header: Header, snapshot: Snapshot) -> Marker:
        identity = b"".join(
            len(part).to_bytes(4, "little") + part for part in (header.volume_id.encode(), snapshot.id.encode())
        )
        label = _UNNAMEABLE.sub("_", snapshot.name)[:_LABEL_LIMIT]
        return cls(xxhash.xxh3_64_hexdigest(identity), label)

    @classmethod
    def parse(cls, name: str) -> Marker | None:
        """The marker that a snapshot of this name is; None if it is none."""
        match = _MARKER.fullmatch(name)
        return cls(match["digest"], match["label"]) if match else None

    @property
    def name(self) -> str:
        """What the snapshot is called that is this marker."""
        return f"restored-{self.digest}-{self.label}"


@dataclass(frozen=True, slots=True)
class Held:
    """What an existing target holds: its newest marker, and whether it is still as it was then."""

    marker: Marker | None
    unchanged: bool
    is_complete: bool = True
    """False: a restore, or whatever else has filled it, has not ended."""


class RestoredState(Protocol):
    """Where markers are kept."""

    async def held(self) -> Held | None:
        """None: the target is new, and nothing was ever written to it."""

    async def mark(self, marker: Marker) -> None:
        """Take the marker's snapshot; durable when it returns."""

    async def finish(self) -> None:
        """All streams were applied: the target, which `Destination.open` says is being filled, is complete."""


# -- the decision ------------------------------------------------------------------------------------------------------


def judge(streams: Sequence[tuple[str, Header]], held: Held | None, target: str) -> None:
    """Whether these streams, by name and header, may be applied in this order. Raises BackupError that says why not."""
    assert streams
    require_complete(held, target)
    first_name, first = streams[0]
    if held is None:
        if first.base is not None:
            raise _gap(first_name, first, f"{target} is new and empty")
    elif first.base is None:
        raise _refusal(f"{first_name} is a full backup, and {target} exists; restore it to a new volume")
    elif held.marker is None:
        raise _refusal(
            f"{first_name} is an increment, and {target} was not restored from a backup as a whole, so it can't be its "
            f"base; restore the full backup to a new volume, then this"
        )
    elif held.marker != Marker.of(first, first.base):
        raise _gap(first_name, first, f"{target} is at {held.marker.label} ({held.marker.name})")
    elif not held.unchanged:
        raise _refusal(
            f"{target} has changed since its snapshot {held.marker.name} was restored, so {first_name} doesn't fit it; "
            f"roll it back to that snapshot, or restore the full backup to a new volume"
        )
    for (_, before), (name, header) in itertools.pairwise(streams):
        if header.base is None:
            raise _refusal(f"{name} is another full backup; only increments may follow the first")
        if header.volume_id != before.volume_id:
            raise _refusal(f"{name} is of another volume ({header.title}) than the one before it ({before.title})")
        if header.base.id != before.snapshot.id:
            raise _gap(name, header, f"{target} would be at {_named(before.snapshot)} by then")


def require_complete(held: Held | None, target: str) -> None:
    """Raise BackupError for a target that something has begun to fill, and not ended."""
    if held is not None and not held.is_complete:
        raise _refusal(
            f"{target} is not complete: a restore or an import that was to fill it has not ended. If it isn't running "
            f"any more, {_way_out(held)}"
        )


def _way_out(held: Held | None) -> str:
    step = "delete it and restore again"
    if held is not None and held.marker is not None:
        return f"roll it back to its snapshot {held.marker.name}, or {step}"
    return step


def remaining(headers: Sequence[Header], held: Held | None) -> int:
    """How many of a chain's streams a target has already, by its marker."""
    if held is not None and held.marker is not None:
        for number, header in enumerate(headers, 1):
            if Marker.of(header, header.snapshot) == held.marker:
                return number
    return 0


def _gap(name: str, header: Header, state: str) -> BackupError:
    assert header.base is not None
    base = header.base
    return _refusal(f"{name} is an increment based on snapshot {_named(base)}, and {state}; apply {base.name} first")


def _named(snapshot: Snapshot) -> str:
    return f"{snapshot.name} (id {snapshot.id}, of {time_text(snapshot.taken_us)})"


def _refusal(why: str) -> BackupError:
    return BackupError(errno.EINVAL, why)


# -- the effect --------------------------------------------------------------------------------------------------------


async def restore(
    streams: Sequence[StreamReader],
    destination: Destination,
    state: RestoredState,
    held: Held | None,
    *,
    target: str,
    progress: Callable[[int], None] | None = None,
) -> list[Totals]:
    """Apply streams in order to a target that holds `held`. `progress` hears of the bytes of all streams read so far.

    Raises BackupError; where it says that the target is incomplete, that holds a part of a stream.
    """
    judge([(stream.stream, stream.header) for stream in streams], held, target)
    done: list[Totals] = []
    for stream in streams:
        before = sum(totals.stream_bytes for totals in done)

        def advance(position: int, before: int = before) -> None:
            if progress is not None:
                progress(before + position)

        # A new volume reads as zeros already; the first stream is the full one, then.
        skip_zeros = held is None and not done
        async with destination.open(stream.header.size_bytes) as volume:
            try:
                totals = await _apply(stream, volume, target, advance, skip_zeros=skip_zeros)
            except (OSError, KeyboardInterrupt) as error:
                why = "stopped" if isinstance(error, KeyboardInterrupt) else str(error)
                number = getattr(error, "errno", None) or errno.EINTR
                raise BackupError(number, f"{why}; {incomplete(stream.header, held, target)}") from None
        await state.mark(Marker.of(stream.header, stream.header.snapshot))
        done.append(totals)
        held = Held(Marker.of(stream.header, stream.header.snapshot), unchanged=True)
    await state.finish()
    return done


def incomplete(header: Header, held: Held | None, target: str) -> str:
    """What to say of a target to which a stream was applied in part."""
    return f"{target} is incomplete now, with only a part of {header.title}: don't use it, {_way_out(held)}"


async def _apply(
    stream: StreamReader, volume: Target, target: str, advance: Callable[[int], None], *, skip_zeros: bool
) -> Totals:
    """Write what a stream holds, several records at a time: they don't overlap, so their order doesn't matter."""
    records = stream.records()
    limit = trio.Semaphore(IN_FLIGHT)

    async def put(record: Record) -> None:
        try:
            if isinstance(record, Data):
                await volume.write(record.offset, record.data)
            else:
                await volume.write_zeroes(record.offset, record.length)
        except OSError as error:
            raise BackupError(
                error.errno or errno.EIO,
                f"{target} can't be written at byte {record.offset}: {error.strerror or error}",
            ) from None
        finally:
            limit.release()

    with alone():
        async with trio.open_nursery() as nursery:
            # A pipe may be silent for long; whoever stops the program doesn't wait for that.
            while batch := await trio.to_thread.run_sync(_next_batch, records, abandon_on_cancel=True):
                for record in batch:
                    if skip_zeros and not isinstance(record, Data):
                        continue
                    await limit.acquire()
                    nursery.start_soon(put, record)
                advance(stream.position)
    await volume.flush()
    assert stream.totals is not None
    return stream.totals


def _next_batch(records: Iterator[Record]) -> list[Record]:
    """Some more records, none at the end: small ones together, since a worker's round trip costs more than they do."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data) if isinstance(record, Data) else 0
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
            break
    return batch
