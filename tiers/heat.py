"""How often blocks were read and written lately: counters that placement decides by. No IO and no waiting in here.

Two structures, for two questions:

- **Extents** (`Extents`): how hot is this part of the volume? A byte for reads and a byte for writes of each 64 KiB
  extent, in chunks that exist only where something was touched: 32 MiB of counters for a TiB of volume that is in use
  everywhere, and never more than `max_bytes` in all. A request counts once in each extent that it touches.
- **Sketches** (`Sketch`): how hot is this block? Hot blocks are scattered, an extent of 64 KiB is mostly cold ones
  around a hot one. A count-min sketch of touches of single blocks, one of reads and one of writes, over all volumes
  of the pool. It can't be asked what is hot, only how hot a given block is, and may say too much, never too little
  (but for saturation).

Units: a counter is a number of touches, halved once each half-life, and a sketch also whenever so much has been
counted that its old counts would crowd it. So a block that is touched n times a half-life, again and again, comes to
between n and 2n. A sketch counts to 255. An extent's byte is exact up to 16 and from there on a logarithm, each level
a sixteenth more than the one below (`TOUCHES`): up to 29 million touches, rounded at random so that the mean is right.

Sequential streams earn no heat (`Streams`): a request that goes on where an earlier one ended is part of a stream, and
once that is longer than a cutoff, none of it counts. Heat is advice: what is lost of it costs warmth.
"""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

EXTENT_BITS = 4
EXTENT_BLOCKS = 1 << EXTENT_BITS
"""64 KiB."""
CHUNK_BITS = 12
CHUNK_EXTENTS = 1 << CHUNK_BITS
"""Counters of 256 MiB of a volume come and go together, in 8 KiB."""
CHUNK_BLOCK_BITS = EXTENT_BITS + CHUNK_BITS
ROW_BYTES = 2 * CHUNK_EXTENTS
KEY_BITS = 22
"""Chunks of a volume: 1 PiB has 2^22. A chunk's key is volume << KEY_BITS | chunk."""
FIRST_ROWS = 64
LARGEST_COPY_ROWS = 4096
"""32 MiB."""
SLICE_ROWS = 128
"""Rows that one step of a slow pass handles: 1 MiB."""

MIN_SKETCH_BITS, MAX_SKETCH_BITS = 10, 22
"""Two bytes or more for each block of a pool, and at most 16 MiB for both sketches: what counts is not how many blocks
there are, but how many are touched between two halvings."""
WRITE_PATIENCE = 4
"""Writes are remembered for longer, where they go to few enough blocks: two or three writes don't tell what is written
four times as often as the rest."""

EXACT = 16
_GROWTH = 1 + 1 / 16


class Touch(IntEnum):
    """What was done to a block; also the place of its counters."""

    READ = 0
    WRITE = 1


def _levels() -> npt.NDArray[np.float32]:
    level = np.arange(256, dtype=np.float64)
    return np.where(level <= EXACT, level, EXACT * _GROWTH ** (level - EXACT)).astype(np.float32)


TOUCHES = _levels()
"""How many touches a byte of an extent stands for."""
_HALVED = np.abs(TOUCHES[:, None] / 2 - TOUCHES[None, :]).argmin(axis=1).astype(np.uint8)
_HALVED[: EXACT + 1] = np.arange(EXACT + 1) >> 1  # down, so that everything fades to nothing


class Extents:
    """Counters by extent, for all volumes of a pool; at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_rows = max(1, max_bytes // ROW_BYTES)
        self._cells = np.zeros(min(self.max_rows, FIRST_ROWS) * ROW_BYTES, np.uint8)
        self._keys: Ints = np.empty(0, np.int64)
        """Keys of the chunks that exist, ascending, and the row of each."""
        self._rows: Ints = np.empty(0, np.int64)
        self._free: list[int] = []
        self._top = 0
        self._rng = np.random.Generator(np.random.PCG64(0))
        self.crowded = False
        """There was no row for a chunk: it goes uncounted until `evict` has made room."""

    def __len__(self) -> int:
        return len(self._keys)

    def note(self, touch: Touch, volume_id: int, extents: Ints, counts: Ints) -> None:
        """Count touches of distinct `extents`, ascending."""
        if not len(extents):
            return
        chunks = extents >> CHUNK_BITS
        first = np.flatnonzero(np.concatenate(([True], chunks[1:] != chunks[:-1])))
        rows = self._rows_of(volume_id << KEY_BITS | chunks[first])
        row = np.repeat(rows, np.diff(np.append(first, len(chunks))))
        cells = row * ROW_BYTES + touch * CHUNK_EXTENTS + (extents & CHUNK_EXTENTS - 1)
        if rows.min() < 0:
            there = row >= 0
            cells, counts = cells[there], counts[there]
        level = self._cells[cells]
        small = level + counts
        if int(small.max(initial=0)) <= EXACT:
            self._cells[cells] = small
            return
        value = TOUCHES[level] + counts
        below = np.minimum(np.searchsorted(TOUCHES, value, side="right") - 1, 254)
        share = (value - TOUCHES[below]) / (TOUCHES[below + 1] - TOUCHES[below])
        self._cells[cells] = below + (self._rng.random(len(cells), np.float32) < share)

    def _rows_of(self, keys: Ints) -> Ints:
        """The rows of distinct ascending keys, made where they are missing; -1 where there is no room."""
        at = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), np.bool_)
        inside = at < len(self._keys)
        known[inside] = self._keys[at[inside]] == keys[inside]
        rows = np.full(len(keys), -1, np.int64)
        rows[known] = self._rows[at[known]]
        if not known.all():
            missing = np.flatnonzero(~known)
            fresh = self._take(len(missing))
            self.crowded |= len(fresh) < len(missing)
            missing = missing[: len(fresh)]
            rows[missing] = fresh
            where = at[missing]
            self._keys = np.insert(self._keys, where, keys[missing])
            self._rows = np.insert(self._rows, where, fresh)
        return rows

    def _take(self, count: int) -> list[int]:
        """Up to `count` rows of zeros."""
        taken = self._free[-count:]
        del self._free[-count:]
        for row in taken:
            self._cells[row * ROW_BYTES : (row + 1) * ROW_BYTES] = 0
        fresh = min(count - len(taken), self.max_rows - self._top)
        self._grow(self._top + fresh)
        taken += range(self._top, self._top + fresh)
        self._top += fresh
        return taken

    def _grow(self, rows: int) -> None:
        """Have memory for so many rows: twice as much each time, and all of it when copying would take too long."""
        held = len(self._cells) // ROW_BYTES
        if rows <= held:
            return
        while held < rows:
            held = 2 * held if held < LARGEST_COPY_ROWS else self.max_rows
        cells = np.zeros(min(held, self.max_rows) * ROW_BYTES, np.uint8)
        cells[: len(self._cells)] = self._cells
        self._cells = cells

    def _drop(self, gone: Mask) -> None:
        self._free += self._rows[gone].tolist()
        self._keys, self._rows = self._keys[~gone], self._rows[~gone]

    def forget(self, volume_id: int, from_block: int = 0) -> None:
        """A volume was deleted, or shrunk to `from_block` blocks. Costs the same whatever it was."""
        first = -(-from_block >> CHUNK_BLOCK_BITS) if from_block else 0
        lo, hi = np.searchsorted(self._keys, [volume_id << KEY_BITS | first, volume_id + 1 << KEY_BITS])
        gone = np.zeros(len(self._keys), np.bool_)
        gone[lo:hi] = True
        if lo < hi:
            self._drop(gone)
        inside = from_block + EXTENT_BLOCKS - 1 >> EXTENT_BITS & CHUNK_EXTENTS - 1
        if from_block and inside:
            row = self._find(volume_id << KEY_BITS | from_block + EXTENT_BLOCKS - 1 >> CHUNK_BLOCK_BITS)
            if row is not None:
                self._row(row)[:, inside:] = 0

    def volumes(self) -> set[int]:
        """The ids of all volumes that something is known of."""
        return set((self._keys >> KEY_BITS).tolist())

    def _find(self, key: int) -> int | None:
        at = int(np.searchsorted(self._keys, key))
        return int(self._rows[at]) if at < len(self._keys) and self._keys[at] == key else None

    def _row(self, row: int) -> Bytes:
        return self._cells[row * ROW_BYTES : (row + 1) * ROW_BYTES].reshape(2, CHUNK_EXTENTS)

    def halve(self) -> Iterator[None]:
        """Halve all counters, a MiB a step; chunks that fade to nothing are dropped."""
        for first in range(0, self._top, SLICE_ROWS):
            cells = self._cells[first * ROW_BYTES : min(first + SLICE_ROWS, self._top) * ROW_BYTES]
            np.take(_HALVED, cells, out=cells)
            faded: Mask = cells.reshape(-1, ROW_BYTES).max(axis=1) == 0
            mine = (self._rows >= first) & (self._rows < first + len(faded))
            mine[mine] = faded[self._rows[mine] - first]
            if mine.any():
                self._drop(mine)
            yield

    def evict(self) -> Iterator[None]:
        """Drop the coldest eighth of the chunks, a MiB a step to find them."""
        heat = np.zeros(self.max_rows, np.float64)
        for first in range(0, self._top, SLICE_ROWS):
            cells = self._cells[first * ROW_BYTES : min(first + SLICE_ROWS, self._top) * ROW_BYTES]
            part = cells.reshape(-1, ROW_BYTES)
            heat[first : first + len(part)] = part.sum(axis=1, dtype=np.int64)
            yield
        gone = np.zeros(len(self._rows), np.bool_)
        gone[np.argsort(heat[self._rows], kind="stable")[: -(-len(gone) // 8)]] = True
        self._drop(gone)
        self.crowded = False

    def chunks(self, volume_id: int) -> Iterator[tuple[int, Bytes]]:
        """What is known of a volume: (chunk, reads and writes by extent as levels, to be looked at only)."""
        lo, hi = np.searchsorted(self._keys, [volume_id << KEY_BITS, volume_id + 1 << KEY_BITS])
        for key, row in zip(self._keys[lo:hi].tolist(), self._rows[lo:hi].tolist(), strict=True):
            yield key & (1 << KEY_BITS) - 1, self._row(row)

    def chunk_count(self, volume_id: int) -> int:
        """How many chunks of a volume something is known of."""
        lo, hi = np.searchsorted(self._keys, [volume_id << KEY_BITS, volume_id + 1 << KEY_BITS])
        return int(hi - lo)

    def batches(self, volume_id: int, stride: int) -> Iterator[tuple[Ints, Bytes]]:
        """Copies of what is known of a volume, some chunks a step: (chunks, levels of every `stride`-th extent).

        The latter has the shape (chunks, 2, CHUNK_EXTENTS / stride), reads and writes. What changes between two steps
        may be in it or not.
        """
        after = volume_id << KEY_BITS
        while True:
            lo, hi = np.searchsorted(self._keys, [after, volume_id + 1 << KEY_BITS])
            keys = self._keys[lo : min(hi, lo + 64 * stride)]
            if not len(keys):
                return
            rows = self._rows[lo : lo + len(keys)]
            cells = self._cells.reshape(-1, 2, CHUNK_EXTENTS)[:, :, ::stride][rows]
            yield keys & (1 << KEY_BITS) - 1, cells
            after = int(keys[-1]) + 1

    def levels(self, volume_id: int, blocks: Ints) -> npt.NDArray[np.uint8]:
        """The levels of the extents that `blocks` lie in: shape (2, len(blocks)), reads and writes."""
        keys = volume_id << KEY_BITS | blocks >> CHUNK_BLOCK_BITS
        found = np.zeros((2, len(blocks)), np.uint8)
        if len(self._keys):
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            known = self._keys[at] == keys
            cells = self._rows[at[known]] * ROW_BYTES + (blocks[known] >> EXTENT_BITS & CHUNK_EXTENTS - 1)
            found[Touch.READ, known] = self._cells[cells]
            found[Touch.WRITE, known] = self._cells[cells + CHUNK_EXTENTS]
        return found

    def export(self) -> Iterator[tuple[Ints, Bytes]]:
        """All of it, copied a MiB a step: (keys, their rows). What changes meanwhile may be in it or not."""
        keys = self._keys
        for first in range(0, len(keys), SLICE_ROWS):
            part = keys[first : first + SLICE_ROWS]
            at = np.searchsorted(self._keys, part)
            there = at < len(self._keys)
            there[there] = self._keys[at[there]] == part[there]
            rows = self._rows[at[there]]
            yield part[there], self._cells.reshape(-1, ROW_BYTES)[rows]

    def restore(self, keys: Ints, rows: Bytes) -> None:
        """Take over what `export` gave. Keys that are there already, or have no room, stay as they are."""
        order = np.argsort(keys)
        fresh = ~np.isin(keys[order], self._keys)
        order = order[fresh]
        places = self._rows_of(keys[order])
        there = places >= 0
        self._cells.reshape(-1, ROW_BYTES)[places[there]] = rows[order[there]]


_FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_WORD = (1 << 64) - 1


class Sketch:
    """Touches of single blocks: a count-min sketch of two rows of 2^bits bytes, with conservative update."""

    ROWS = 2
    _MULTIPLIERS = (np.uint64(_FIRST), np.uint64(_SECOND))
    _VOLUME = 0x165667B19E3779F9

    def __init__(self, bits: int, patience: int = 1) -> None:
        self.bits = bits
        self.rows: list[Bytes] = [np.zeros(1 << bits, np.uint8) for _ in range(self.ROWS)]
        self.noted = 0
        """Touches since the counts were last halved."""
        self.halvings = 0
        self._patience = patience
        self._fresh = 0
        """Blocks that were new to it since then."""

    @property
    def is_due(self) -> bool:
        """So much was counted that old counts must fade, or all blocks would seem hot. Measured: architecture.md.

        With `patience` up to so many times as much, while few blocks share it.
        """
        return self._fresh >= 1 << self.bits or self.noted >= self._patience << self.bits

    def _places(self, volume_ids: int | Ints, blocks: Ints) -> list[npt.NDArray[np.uint64]]:
        mixed = blocks.astype(np.uint64) * self._MULTIPLIERS[0]
        if isinstance(volume_ids, int):
            mixed += np.uint64(volume_ids * self._VOLUME & _WORD)
        else:
            mixed += volume_ids.astype(np.uint64) * np.uint64(self._VOLUME)
        mixed ^= mixed >> np.uint64(32)
        shift = np.uint64(64 - self.bits)
        return [mixed * multiplier >> shift for multiplier in self._MULTIPLIERS]

    def note(self, volume_id: int, blocks: Ints, counts: Ints) -> None:
        """Count touches of distinct blocks of one volume."""
        places = self._places(volume_id, blocks)
        seen = [row[place] for row, place in zip(self.rows, places, strict=True)]
        known = np.minimum(*seen)
        count = np.minimum(known + counts, 255).astype(np.uint8)
        for row, place in zip(self.rows, places, strict=True):
            np.maximum.at(row, place, count)  # two of these blocks may have the same place
        self.noted += int(counts.sum())
        self._fresh += len(known) - int(np.count_nonzero(known))

    def estimates(self, volume_ids: int | Ints, blocks: Ints) -> Bytes:
        """How often each of these blocks was touched lately: 0 to 255, at least the truth, rarely more."""
        first, second = (row[place] for row, place in zip(self.rows, self._places(volume_ids, blocks), strict=True))
        smaller: Bytes = np.minimum(first, second)
        return smaller

    def estimate(self, volume_id: int, block: int) -> int:
        """`estimates` for one block, without what arrays cost (1 us instead of 12)."""
        mixed = block * _FIRST + volume_id * self._VOLUME & _WORD
        mixed ^= mixed >> 32
        shift = 64 - self.bits
        first, second = self.rows
        return min(int(first[(mixed * _FIRST & _WORD) >> shift]), int(second[(mixed * _SECOND & _WORD) >> shift]))

    def recall(self, rows: list[Bytes], noted: int) -> None:
        """Take over what another one counted, maybe one of another size: a place is the upper bits of a hash.

        What one with fewer places says too much, this one says too.
        """
        more = self.bits - (len(rows[0]).bit_length() - 1)
        if more > 0:
            rows = [np.repeat(row, 1 << more) for row in rows]
        elif more < 0:
            rows = [row.reshape(-1, 1 << -more).max(axis=1) for row in rows]
        self.rows = rows
        self.noted = min(noted, self._patience << self.bits)
        self._fresh = int(np.count_nonzero(rows[0])) >> max(0, more)

    def halve(self) -> Iterator[None]:
        """Halve all counts, a MiB a step."""
        self.noted = self._fresh = 0
        self.halvings += 1
        for row in self.rows:
            for first in range(0, len(row), 1 << 20):
                part = row[first : first + (1 << 20)]
                part >>= 1
                yield


class Streams:
    """Tells one volume's sequential streams from its other requests; those of one kind, reads or writes.

    It sees what was requested between two drains, in order, and remembers where the streams of earlier drains ended.
    Requests of a stream may overtake each other a little (a client with a queue), as long as they join up.
    """

    TABLE = 64
    DISORDER = 64
    PATIENCE = 64
    """Drains that a stream may be silent for."""

    def __init__(self) -> None:
        self._ends: Ints = np.empty(0, np.int64)
        self._lengths: Ints = np.empty(0, np.int64)
        self._ages: Ints = np.empty(0, np.int64)

    def earning(self, starts: Ints, counts: Ints, order: Ints, cutoff_blocks: int) -> Mask | None:
        """Which requests are in no stream of more than `cutoff_blocks`; None: all.

        `starts` ascending, in blocks; `order`: the place of each in the order of arrival.
        """
        ends = starts + counts
        joins = (starts[1:] == ends[:-1]) & (order[1:] + self.DISORDER > order[:-1])
        if joins.any():
            first = np.flatnonzero(np.concatenate(([True], ~joins)))
            lengths = np.add.reduceat(counts, first)
            run_starts = starts[first]
        else:
            first, lengths, run_starts = None, counts, starts
        at = np.searchsorted(run_starts, self._ends)
        goes_on = at < len(run_starts)
        goes_on[goes_on] = run_starts[at[goes_on]] == self._ends[goes_on]
        if goes_on.any():
            lengths = lengths.copy()
            np.maximum.at(lengths, at[goes_on], lengths[at[goes_on]] + self._lengths[goes_on])
        self._remember(run_starts, lengths, order if first is None else order[first], goes_on, counts, first)
        if first is None:
            return lengths <= cutoff_blocks if goes_on.any() or int(counts.max()) > cutoff_blocks else None
        run_earns = lengths <= cutoff_blocks
        if run_earns.all():
            return None
        return np.repeat(run_earns, np.diff(np.append(first, len(starts))))

    def _remember(
        self, run_starts: Ints, lengths: Ints, arrived: Ints, goes_on: Mask, counts: Ints, first: Ints | None
    ) -> None:
        """Keep the longest streams, and the last requests of this drain: they may begin one."""
        reach = counts if first is None else np.add.reduceat(counts, first)
        if len(lengths) > self.TABLE:
            half = self.TABLE // 2
            chosen = np.union1d(
                np.argpartition(arrived, -half)[-half:],
                np.argpartition(lengths, -half)[-half:],
            )
        else:
            chosen = np.arange(len(lengths))
        stays = ~goes_on & (self._ages < self.PATIENCE)
        ends = np.concatenate((run_starts[chosen] + reach[chosen], self._ends[stays]))
        kept = np.concatenate((lengths[chosen], self._lengths[stays]))
        ages = np.concatenate((np.zeros(len(chosen), np.int64), self._ages[stays] + 1))
        if len(ends) > self.TABLE:
            # The long ones first, young before old; what is new and short fills the rest.
            best = np.lexsort((ages, -kept))[: self.TABLE]
            newest = np.lexsort((-kept, ages))[: self.TABLE]
            best = np.unique(np.concatenate((best[: self.TABLE // 2], newest[: self.TABLE // 2])))
            ends, kept, ages = ends[best], kept[best], ages[best]
        self._ends, self._lengths, self._ages = ends, kept, ages


class Heat:
    """The counters of one pool. `slots`: how many blocks it can hold, for the size of the sketches."""

    def __init__(self, max_bytes: int, slots: int) -> None:
        self.extents = Extents(max_bytes)
        bits = min(MAX_SKETCH_BITS, max(MIN_SKETCH_BITS, slots.bit_length() + 1))
        self.sketches = (Sketch(bits), Sketch(bits, WRITE_PATIENCE))
        """By `Touch`."""

    def note(self, touch: Touch, volume_id: int, starts: Ints, counts: Ints) -> None:
        """Count requests for `counts` blocks from `starts` of one volume. `starts` ascending."""
        if int(counts.max()) == 1:
            blocks = starts
            requests = starts >> EXTENT_BITS
        else:
            blocks = np.sort(expanded(starts, counts))
            first = starts >> EXTENT_BITS
            requests = np.sort(expanded(first, (starts + counts - 1 >> EXTENT_BITS) - first + 1))
        self.extents.note(touch, volume_id, *_tallied(requests))
        self.sketches[touch].note(volume_id, *_tallied(blocks))

    @property
    def halvings(self) -> float:
        """How often the counts of blocks were halved: those of reads and of writes, in the mean."""
        return (self.sketches[0].halvings + self.sketches[1].halvings) / 2

    def estimate(self, volume_id: int, block: int) -> int:
        """`estimates` for one block."""
        reads, writes = self.sketches
        return min(255, reads.estimate(volume_id, block) + writes.estimate(volume_id, block))

    def estimates(self, volume_ids: int | Ints, blocks: Ints) -> Bytes:
        """How often each block was read or written lately: 0 to 255. `volume_ids`: one for all, or one for each."""
        reads, writes = (sketch.estimates(volume_ids, blocks).astype(np.uint16) for sketch in self.sketches)
        total: Bytes = np.minimum(reads + writes, 255).astype(np.uint8)
        return total

    def write_estimates(self, volume_ids: int | Ints, blocks: Ints) -> Bytes:
        """How often each block was written lately: what will be overwritten soon, and leave a hole where it lies."""
        return self.sketches[Touch.WRITE].estimates(volume_ids, blocks)


def _tallied(values: Ints) -> tuple[Ints, Ints]:
    """Distinct ones of ascending values, and how many there are of each."""
    first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return values[first], np.diff(np.append(first, len(values)))


def expanded(starts: Ints, counts: Ints) -> Ints:
    """Every member of the ranges: starts[0], starts[0] + 1, ..."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
