"""Frames: runs of up to 32 blocks, compressed with zstd, in the slots of a PACKED segment.

A frame is one zstd frame with its content size in its header, padded with zeros to whole slots. It begins at a slot
and takes at least an eighth fewer slots than it has blocks: what saves less is not worth a decompression for each
read, and stays raw.

Address of a block in a frame: the slot part of an address (see layout) is

    bits 10-23   first slot of the frame in its segment
    bits  5-9    slots that the frame takes, less 1
    bits  0-4    index of the block in the frame

So whoever has a map entry can read the frame without looking anything up, and the blocks of a frame have consecutive
addresses. Two frames' addresses are never consecutive, because they begin at different slots.

Frame table: the extra words of the batch that brings the frames, in order, two for each:

    word 0   blocks << 32 | slots
    word 1   XXH3-64 of all slots of the frame, padding included

The table is for who reads a segment without the map (scrub, cleaning). Readers verify each block that they return
against the map's check, after decompression, so what a frame's bytes decompress to is judged there and not before:
`unpack` only sees to it that damaged bytes give an error or some blocks, in bounded memory.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import zstandard

from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT, SLOT_BITS, SLOT_MASK, check_of

Buffer = bytes | bytearray | memoryview

INDEX_BITS = 5
MAX_FRAME_BLOCKS = 1 << INDEX_BITS
MAX_FRAME_BYTES = MAX_FRAME_BLOCKS * BLOCK_BYTES
_INDEX_MASK = MAX_FRAME_BLOCKS - 1
_START_SHIFT = 2 * INDEX_BITS
FIRST_SLOT_LIMIT = 1 << SLOT_BITS - _START_SHIFT
"""Slots that an address can tell apart: those of the largest segment."""
CACHE_BYTES = 16 << 20


class BadFrameError(Exception):
    """The bytes are not a frame of whole blocks."""


class Frame(NamedTuple):
    """A frame as its batch's table describes it."""

    blocks: int
    slots: int
    check: int


class Packed(NamedTuple):
    """A frame to be written: its slots, padded."""

    data: bytes
    blocks: int
    check: int

    @property
    def slots(self) -> int:
        """Slots that it takes."""
        return len(self.data) >> BLOCK_SHIFT

    @property
    def described(self) -> Frame:
        """What the frame table says of it."""
        return Frame(self.blocks, self.slots, self.check)


# -- addresses ---------------------------------------------------------------------------------------------------------


def place_in_frame(first_slot: int, slots: int, index: int) -> int:
    """The slot part of the address of a block in a frame."""
    assert first_slot > 0 and first_slot + slots <= FIRST_SLOT_LIMIT
    assert 1 <= slots <= MAX_FRAME_BLOCKS and 0 <= index < MAX_FRAME_BLOCKS
    return first_slot << _START_SHIFT | slots - 1 << INDEX_BITS | index


def frame_of(address: int) -> int:
    """What all addresses in one frame have in common, and no other: its first block's address."""
    return address & ~_INDEX_MASK


def index_of(address: int) -> int:
    """Index of the block in its frame."""
    return address & _INDEX_MASK


def slots_of(address: int) -> tuple[int, int]:
    """(first slot, slots) of the frame that an address lies in."""
    return (address & SLOT_MASK) >> _START_SHIFT, (address >> INDEX_BITS & _INDEX_MASK) + 1


# -- packing -----------------------------------------------------------------------------------------------------------

_compressors: dict[int, list[zstandard.ZstdCompressor]] = {}
"""By level, those that nobody is using: one must not be used by two threads at once, and each costs half a megabyte."""
_decompressors: list[zstandard.ZstdDecompressor] = []
MAX_IDLE = 4


def pack(blocks: Sequence[Buffer], level: int) -> Packed | None:
    """Compress blocks into a frame; None if it would not save an eighth of their slots. For worker threads."""
    assert 1 <= len(blocks) <= MAX_FRAME_BLOCKS
    idle = _compressors.setdefault(level, [])
    try:
        compressor = idle.pop()
    except IndexError:
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    compressed = compressor.compress(b"".join(blocks))
    if len(idle) < MAX_IDLE:
        idle.append(compressor)
    slots = -(-len(compressed) // BLOCK_BYTES)
    if 8 * slots > 7 * len(blocks):
        return None
    data = compressed.ljust(slots << BLOCK_SHIFT, b"\0")
    return Packed(data, len(blocks), check_of(data))


def pack_all(groups: Sequence[Sequence[Buffer]], level: int) -> list[Packed | None]:
    """`pack` for several frames, in one worker."""
    return [pack(group, level) for group in groups]


def unpack(data: Buffer) -> bytes:
    """The blocks of a frame, given its slots. Raises BadFrameError for everything that isn't one.

    What it returns is whole blocks, at most 128 KiB, and else unverified. For worker threads.
    """
    try:
        parameters = zstandard.get_frame_parameters(data)
        size = parameters.content_size
        # Memory is taken for what the header says, so it is judged first.
        if not BLOCK_BYTES <= size <= MAX_FRAME_BYTES or size % BLOCK_BYTES:
            raise BadFrameError(f"a frame of {size} bytes")
        if parameters.window_size > MAX_FRAME_BYTES or parameters.dict_id:
            raise BadFrameError("a frame that no release writes")
        try:
            decompressor = _decompressors.pop()
        except IndexError:
            decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_FRAME_BYTES)
        # After an error it is not used again.
        result = decompressor.decompress(data, max_output_size=MAX_FRAME_BYTES)
        if len(_decompressors) < MAX_IDLE:
            _decompressors.append(decompressor)
    except (zstandard.ZstdError, ValueError) as error:
        raise BadFrameError(f"no sound frame: {error}") from None
    if len(result) != size:
        raise BadFrameError(f"a frame of {len(result)} bytes that claims {size}")
    return result


def unpack_all(frames: Sequence[Buffer]) -> list[bytes]:
    """`unpack` for several frames, in one worker; nothing for those that are damaged."""
    return [_unpacked_or_nothing(data) for data in frames]


def _unpacked_or_nothing(data: Buffer) -> bytes:
    try:
        return unpack(data)
    except BadFrameError:
        return b""


def block_at(content: bytes, address: int) -> memoryview:
    """The bytes of the block with that address in its frame's content; none if the frame has no such block."""
    at = index_of(address) << BLOCK_SHIFT
    return memoryview(content)[at : at + BLOCK_BYTES]


# -- keeping -----------------------------------------------------------------------------------------------------------


class FrameCache:
    """Contents of frames read lately, by the address of their first block: a sequential reader unpacks each once.

    Segment ids are never reused, so nothing here can go stale; but nothing here is verified, either.
    """

    def __init__(self, bound_bytes: int = CACHE_BYTES) -> None:
        self.bytes = 0
        self._bound = bound_bytes
        self._contents: OrderedDict[int, bytes] = OrderedDict()

    def get(self, address: int) -> bytes | None:
        """The content of the frame that an address lies in."""
        key = address & ~_INDEX_MASK
        content = self._contents.get(key)
        if content is not None:
            self._contents.move_to_end(key)
        return content

    def put(self, address: int, content: bytes) -> None:
        """Keep a content; the longest unused ones go."""
        self.drop(address)
        self._contents[frame_of(address)] = content
        self.bytes += len(content)
        while self.bytes > self._bound:
            _, oldest = self._contents.popitem(last=False)
            self.bytes -= len(oldest)

    def drop(self, address: int) -> None:
        """Forget a content, because it doesn't hold what it should."""
        content = self._contents.pop(frame_of(address), None)
        if content is not None:
            self.bytes -= len(content)

    def clear(self) -> None:
        """Forget all."""
        self._contents.clear()
        self.bytes = 0
