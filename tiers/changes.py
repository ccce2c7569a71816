"""Which parts of a volume have changed: a sparse set of extents of 64 KiB, and its encoding.

A volume has any number of these sets, its *trackers*, each under a name that its owner gave it. The engine adds every
change to each of them in the step in which it logs it, saves them with each checkpoint as they were at the freeze, and
a replay adds what it replays. So a tracker that was emptied has, after any crash, at least what was written since and
is still there. What the sets are for, and the record that is saved with them, is their owner's business.

In memory a set is pages of bits, each for 2 GiB, where anything is set; pages in which all is set are one shared
object, so that terabytes cost a dictionary's entry for each 2 GiB. To mark one block takes 0.2 us, however many
trackers there are, as long as `Marking` knows of one that has nothing which the others haven't.

Encoded, little-endian:

    offset size type  field
      0     2   u16    format version (1); another version is refused
      2     2   u16    0
      4     4   u32    runs of full pages
      8     4   u32    other pages
     12     ...        one zstd frame, with its content size: for each run u64 first page, u64 pages; then the numbers
                       of the other pages, u64 each, rising; then their bits, 4096 bytes each, bit 0 of byte 0 first

What would be longer than 4 MiB is encoded rounded up: to 512 KiB, 4 MiB, or whole pages. So what is decoded may have
more than what was encoded, never less. There is no check: what carries it has one.
"""

import errno
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
import zstandard

from tiers.errors import TierError
from tiers.layout import BLOCK_SHIFT
from tiers.names import MAX_VOLUME_BYTES
from tiers.record import OP_WORDS

EXTENT_SHIFT: Final = 16
EXTENT_BYTES: Final = 1 << EXTENT_SHIFT
PAGE_BITS: Final = 15
"""Extents of a page, as a power of two."""
PAGE_BYTES: Final = 1 << PAGE_BITS - 3
PAGE_SHIFT: Final = EXTENT_SHIFT + PAGE_BITS
MAX_PAGES: Final = MAX_VOLUME_BYTES >> PAGE_SHIFT
MAX_ENCODED_BYTES: Final = 4 << 20
MAX_OTHER_PAGES: Final = 1 << 14
"""More of them (scattered over more than 32 TiB) are encoded as full ones; so what a decoder may have to hold is
bounded: 64 MiB."""
MAX_TRACKERS: Final = 64
MAX_NAME_BYTES: Final = 255
MAX_RECORD_BYTES: Final = 64 << 10
"""Of the record that is saved with a volume's trackers."""

_VERSION = 1
_HEADER = struct.Struct("<HHII")
_SET_HEADER = struct.Struct("<HH")
_NAME = struct.Struct("<B")
_LENGTH = struct.Struct("<I")
_FULL = b"\xff" * PAGE_BYTES
_EMPTY = bytes(PAGE_BYTES)
_OFFSET_MASK = PAGE_BYTES - 1
_PAGE_MASK = (1 << PAGE_BITS) - 1
_BITS = tuple(1 << i for i in range(8))
_ROUNDED_BYTES = (1, 8)
"""Where the bits are too many: bytes of a page that are set together."""

Pages = dict[int, bytes | bytearray]


class _Runs(Protocol):
    """What an update takes."""

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]: ...


class ChangedExtents:
    """A set of extents of 64 KiB. Offsets and lengths are bytes."""

    __slots__ = ("_pages", "_shared", "edits")

    def __init__(self) -> None:
        self._pages: Pages = {}  # none is empty; a full one may be `_FULL`, which is never changed
        self._shared: set[int] = set()
        """Pages that a copy may have too: they are copied before they change. A copy is taken at each freeze, while
        clients wait."""
        self.edits = 0
        """Grows with each change other than `mark`: the next checkpoint has something to save then."""

    def __bool__(self) -> bool:
        return bool(self._pages)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChangedExtents) and self._pages == other._pages

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<ChangedExtents of {self.count} extents>"

    @property
    def count(self) -> int:
        """How many extents are in it."""
        return sum(
            1 << PAGE_BITS if page is _FULL else int.from_bytes(page, "little").bit_count()
            for page in self._pages.values()
        )

    def add(self, offset: int, length: int) -> None:
        """All extents that the bytes touch."""
        self.edits += 1
        self.mark(offset, length)

    def mark(self, offset: int, length: int) -> bool:
        """The same, of what the log has, so that a replay marks it again. Whether it is known that all were there."""
        first = offset >> EXTENT_SHIFT
        last = offset + length - 1 >> EXTENT_SHIFT
        if first == last and length:
            index = first >> PAGE_BITS
            page = self._pages.get(index)
            if page is None:
                assert index < MAX_PAGES
                page = self._pages[index] = bytearray(PAGE_BYTES)
            at = first >> 3 & _OFFSET_MASK
            bit = _BITS[first & 7]
            if page[at] & bit:
                return True
            if index in self._shared:  # it isn't the full page
                page = self._own(index)
            page[at] |= bit  # type: ignore[index]
        elif length > 0:
            assert last < MAX_PAGES << PAGE_BITS
            self._add_run(first, last + 1)
        return False

    def _own(self, index: int) -> bytearray:
        """A page, which is made if it isn't there, that no copy has: to be changed."""
        page = self._pages.get(index, _EMPTY)
        if not isinstance(page, bytearray) or index in self._shared:
            page = self._pages[index] = bytearray(page)
            self._shared.discard(index)
        return page

    def _add_run(self, first: int, end: int) -> None:
        pages = self._pages
        head, tail = first >> PAGE_BITS, end >> PAGE_BITS
        if head == tail:
            self._set_bits(head, first & _PAGE_MASK, end & _PAGE_MASK)
            return
        if first & _PAGE_MASK:
            self._set_bits(head, first & _PAGE_MASK, 1 << PAGE_BITS)
            head += 1
        pages.update(dict.fromkeys(range(head, tail), _FULL))
        if end & _PAGE_MASK:
            self._set_bits(tail, 0, end & _PAGE_MASK)

    def _set_bits(self, index: int, lo: int, hi: int) -> None:
        if self._pages.get(index) is _FULL or lo == hi:
            return
        page = self._own(index)
        for at, mask in _ends(lo, hi):
            page[at] |= mask
        lo, hi = -(-lo // 8), hi // 8
        if lo < hi:
            page[lo:hi] = _FULL[: hi - lo]

    def discard(self, offset: int, length: int) -> None:
        """Only the extents that lie wholly in there: the last one of a volume may reach past its end."""
        first, end = -(-offset >> EXTENT_SHIFT), offset + length >> EXTENT_SHIFT
        pages = self._pages
        if first >= end or not pages:
            return
        self.edits += 1
        head, tail = first >> PAGE_BITS, end >> PAGE_BITS
        if head == tail:
            self._clear_bits(head, first & _PAGE_MASK, end & _PAGE_MASK)
            return
        if first & _PAGE_MASK:
            self._clear_bits(head, first & _PAGE_MASK, 1 << PAGE_BITS)
            head += 1
        if tail - head > len(pages):
            for index in [index for index in pages if head <= index < tail]:
                del pages[index]
        else:
            for index in range(head, tail):
                pages.pop(index, None)
        if end & _PAGE_MASK:
            self._clear_bits(tail, 0, end & _PAGE_MASK)

    def _clear_bits(self, index: int, lo: int, hi: int) -> None:
        if index not in self._pages or lo == hi:
            return
        page = self._own(index)
        for at, mask in _ends(lo, hi):
            page[at] &= ~mask
        lo, hi = -(-lo // 8), hi // 8
        if lo < hi:
            page[lo:hi] = _EMPTY[: hi - lo]
        if page == _EMPTY:
            del self._pages[index]

    def clear(self) -> None:
        """Have none."""
        self.edits += bool(self._pages)
        self._pages.clear()
        self._shared.clear()

    def update(self, other: _Runs) -> None:
        """Have all that the other set has, too."""
        if not isinstance(other, ChangedExtents):
            for offset, length in other.runs():
                self.add(offset, length)
            return
        pages = self._pages
        self.edits += bool(other)
        for index, more in other._pages.items():
            page = pages.get(index)
            if page is None:
                pages[index] = more if more is _FULL else bytearray(more)
            elif page is not more and page is not _FULL:
                both = int.from_bytes(page, "little") | int.from_bytes(more, "little")
                pages[index] = bytearray(both.to_bytes(PAGE_BYTES, "little"))
                self._shared.discard(index)

    def copy(self) -> "ChangedExtents":
        """Another set with the same extents. It may be read in a worker while this one changes."""
        result = ChangedExtents()
        result._pages = self._pages.copy()
        self._shared = set(self._pages)
        result._shared = self._shared.copy()
        return result

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, length) of maximal runs, in order, from the extent on in which byte `start` lies.

        What is changed while these are asked for may be among them or not.
        """
        begun = start >> EXTENT_SHIFT
        run_first = run_end = -1
        for index in sorted(index for index in self._pages if index >= begun >> PAGE_BITS):
            page = self._pages.get(index)
            if page is None:
                continue
            base = index << PAGE_BITS
            for lo, hi in _runs_in(page):
                first, end = max(base + lo, begun), base + hi
                if first >= end:
                    continue
                if first == run_end:
                    run_end = end
                    continue
                if run_end > run_first:
                    yield run_first << EXTENT_SHIFT, run_end - run_first << EXTENT_SHIFT
                run_first, run_end = first, end
        if run_end > run_first:
            yield run_first << EXTENT_SHIFT, run_end - run_first << EXTENT_SHIFT

    # -- as bytes ------------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """See the module: at most 4 MiB and 8 bytes for each run of pages; may have more than the set."""
        full = sorted(index for index, page in self._pages.items() if page == _FULL)
        others = {index: bytes(page) for index, page in sorted(self._pages.items()) if page != _FULL}
        if len(others) <= MAX_OTHER_PAGES:
            data = _encode(full, others)
            if len(data) <= MAX_ENCODED_BYTES:
                return data
            for group in _ROUNDED_BYTES:
                others = {index: _rounded(page, group) for index, page in others.items()}
                data = _encode(full, others)
                if len(data) <= MAX_ENCODED_BYTES:
                    return data
        return _encode(sorted(self._pages), {})

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> "ChangedExtents":
        """Judge an encoded set. Raises TierError EPROTO."""
        if len(data) < _HEADER.size:
            raise _bad("it is cut short")
        version, zero, run_count, page_count = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise _bad(f"it has format version {version} and this release reads {_VERSION}")
        if zero or page_count > MAX_OTHER_PAGES or run_count > MAX_PAGES:
            raise _bad("its header can't be")
        wanted = 16 * run_count + (8 + PAGE_BYTES) * page_count
        frame = bytes(data[_HEADER.size :])
        if wanted > MAX_OTHER_PAGES * (8 + PAGE_BYTES):
            raise _bad("its header can't be")
        try:
            parameters = zstandard.get_frame_parameters(frame)
            if parameters.content_size != wanted:
                raise _bad("it hasn't the length that its header says")
            body = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False) if wanted else b""
        except zstandard.ZstdError as error:
            raise _bad(f"{error}") from None
        if len(body) != wanted:
            raise _bad("it hasn't the length that its header says")
        words = struct.unpack_from(f"<{2 * run_count + page_count}Q", body)
        result = cls()
        pages = result._pages
        end = -1
        for i in range(0, 2 * run_count, 2):
            first, count = words[i : i + 2]
            if first <= end or not count > 0 or first + count > MAX_PAGES:
                raise _bad("its runs can't be")
            end = first + count
            pages.update(dict.fromkeys(range(first, end), _FULL))
        before = -1
        at = 8 * len(words)
        for index in words[2 * run_count :]:
            bits = body[at : at + PAGE_BYTES]
            at += PAGE_BYTES
            if not before < index < MAX_PAGES or index in pages or bits in (_EMPTY, _FULL):
                raise _bad("its pages can't be")
            before = index
            pages[index] = bytearray(bits)
        return result


class Marking:
    """Marks what is written in all trackers of a volume, asking one only where that one tells for all.

    A tracker that was empty and has got nothing but marks since, which the others got too, has nothing that they
    haven't: what is in it is in all. It does so until a tracker comes or goes, or is changed in another way (`edits`).
    """

    __slots__ = ("_least", "_others", "_seen")

    def __init__(self) -> None:
        self._seen: list[tuple[ChangedExtents, int]] = []
        """All of them, and their edits, as they were when it was looked last."""
        self._least: ChangedExtents | None = None
        self._others: list[ChangedExtents] = []

    def mark(self, trackers: Mapping[str, ChangedExtents], ops: Sequence[int]) -> None:
        """Add the blocks that these operations of a batch change (`tiers.record`) to each of `trackers`."""
        seen = self._seen
        if len(trackers) != len(seen):
            self._look(trackers)
        else:
            for tracker, (before, edits) in zip(trackers.values(), seen):  # noqa: B905 - each batch pays for it
                if tracker is not before or tracker.edits != edits:
                    self._look(trackers)
                    break
        least, others = self._least, self._others
        for i in range(0, len(ops), OP_WORDS):
            offset, length = ops[i + 1] << BLOCK_SHIFT, ops[i + 2] << BLOCK_SHIFT
            if least is None or not least.mark(offset, length):
                for tracker in others:
                    tracker.mark(offset, length)

    def _look(self, trackers: Mapping[str, ChangedExtents]) -> None:
        self._seen = [(tracker, tracker.edits) for tracker in trackers.values()]
        self._least = next((tracker for tracker in trackers.values() if not tracker), None)
        self._others = [tracker for tracker in trackers.values() if tracker is not self._least]


def _bad(why: str) -> TierError:
    return TierError(errno.EPROTO, f"a set of changed extents can't be used: {why}")


def _ends(lo: int, hi: int) -> list[tuple[int, int]]:
    """(byte, mask) of what bits `lo` to before `hi` have of bytes that are not wholly in there."""
    first, last = lo >> 3, hi >> 3
    if first == last:
        return [(first, (1 << hi - lo) - 1 << (lo & 7))] if lo & 7 or hi & 7 else []
    found = [(first, 0xFF << (lo & 7) & 0xFF)] if lo & 7 else []
    return [*found, (last, (1 << (hi & 7)) - 1)] if hi & 7 else found


def _runs_in(page: bytes | bytearray) -> list[tuple[int, int]]:
    """(first, end) of the runs of bits that are set."""
    if page is _FULL:
        return [(0, 1 << PAGE_BITS)]
    bits = np.unpackbits(np.frombuffer(page, np.uint8), bitorder="little")
    edges: list[int] = np.flatnonzero(np.diff(bits, prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _rounded(page: bytes, group: int) -> bytes:
    """Where a bit of `group` bytes is set, all of them are."""
    words: Any = np.frombuffer(page, np.uint8).reshape(-1, group).any(axis=1)
    return np.repeat(np.where(words, np.uint8(255), np.uint8(0)), group).tobytes()


def _encode(full: list[int], others: Mapping[int, bytes]) -> bytes:
    """`full` rises, and so do the keys of `others`; those of them that are full by now are put where they belong."""
    more = [index for index, page in others.items() if page == _FULL]
    if more:
        full = sorted([*full, *more])
        others = {index: page for index, page in others.items() if page != _FULL}
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(full), 1) if b != a + 1), len(full)]
    runs = [(full[a], b - a) for a, b in pairwise(cuts) if a < b]
    body = b"".join(
        [
            struct.pack(f"<{2 * len(runs)}Q", *(word for run in runs for word in run)),
            struct.pack(f"<{len(others)}Q", *others),
            *others.values(),
        ]
    )
    packed = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(body)
    return _HEADER.pack(_VERSION, 0, len(runs), len(others)) + packed


# -- all trackers of a volume ------------------------------------------------------------------------------------------
#
# As they are saved, little-endian:
#
#   offset size type  field
#     0     2   u16    format version (1); another version is refused
#     2     2   u16    trackers
#     4     ...        for each, by name: u8 length of the name, the name in UTF-8, u32 length, the encoded set
#
# It is in the catalog, and in its copies, whose check covers it.


def encode_trackers(trackers: Mapping[str, ChangedExtents]) -> bytes:
    """All of a volume's trackers; empty if there are none. May run in a worker, on copies.

    Raises TierError EINVAL for such as could not be read again: then the checkpoint fails, not the next open.
    """
    if not trackers:
        return b""
    require_trackers(trackers)
    parts = [_SET_HEADER.pack(_VERSION, len(trackers))]
    for name in sorted(trackers):
        raw, data = name.encode(), trackers[name].encode()
        parts += [_NAME.pack(len(raw)), raw, _LENGTH.pack(len(data)), data]
    return b"".join(parts)


def decode_trackers(data: bytes) -> dict[str, ChangedExtents]:
    """Judge what was saved. Raises TierError EPROTO."""
    if not data:
        return {}
    try:
        version, count = _SET_HEADER.unpack_from(data)
        if version != _VERSION:
            raise _bad(f"the trackers have format version {version} and this release reads {_VERSION}")
        at = _SET_HEADER.size
        found: dict[str, ChangedExtents] = {}
        for _ in range(count):
            (length,) = _NAME.unpack_from(data, at)
            at += _NAME.size
            name = data[at : at + length].decode()
            at += length
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if name in found or at + length > len(data):
                raise _bad("the trackers can't be")
            found[name] = ChangedExtents.decode(data[at : at + length])
            at += length
    except (struct.error, UnicodeDecodeError) as error:
        raise _bad(f"the trackers can't be ({error})") from None
    if at != len(data):
        raise _bad("the trackers have something behind them")
    require_trackers(found)
    return found


def require_trackers(trackers: Mapping[str, ChangedExtents]) -> None:
    """Raise TierError EINVAL unless these can be saved."""
    if len(trackers) > MAX_TRACKERS:
        raise TierError(errno.EINVAL, f"{len(trackers)} trackers are too many: a volume has {MAX_TRACKERS} at most")
    for name in trackers:
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise TierError(errno.EINVAL, f"{name!r:.80} can't be a tracker's name: 1 to {MAX_NAME_BYTES} bytes")
