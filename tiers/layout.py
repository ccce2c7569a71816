"""The geometry that everything on a device shares: blocks, slots, segments, and the 64-bit address of a block.

A device is a label area and then segments of one size. A segment is slots of one block (4 KiB) each; slot 0 is its
header. Segment ids are never reused, so a stale address can't be mistaken for a new one.

Address of a block (64 bits):

    bits 24-63   segment id (1 ...; 0 is no segment)
    bits  0-23   slot within the segment

Four addresses lie in no segment: UNMAPPED (0: this map says nothing of the block, which reads as zeros unless the
volume or snapshot has something below it), BAD (1, reads as EIO: the data was found damaged when it had to be moved),
ZEROED (3: reads as zeros, whatever lies below) and INHERITED (4, in the maps of snapshots: what the origin of the
volume has there). No map page has 2.
"""

from collections.abc import Callable

import xxhash

BLOCK_BYTES = 4096
BLOCK_SHIFT = 12
BLOCK_MASK = BLOCK_BYTES - 1

SLOT_BITS = 24
SLOT_MASK = (1 << SLOT_BITS) - 1
UNMAPPED = 0
BAD = 1
ZEROED = 3
INHERITED = 4
FIRST_ADDRESS = 1 << SLOT_BITS
MAX_SEGMENT_ID = (1 << (64 - SLOT_BITS)) - 1

MIB = 1 << 20
LABEL_AREA_BYTES = MIB
MIN_SEGMENT_BYTES = MIB // 2
MAX_SEGMENT_BYTES = 64 * MIB
MIN_DEVICE_BYTES = 32 * MIB
MAX_DEVICE_BYTES = (1 << 63) - 1
"""Where files end."""
MAX_SEQ = (1 << 62) - 1
"""Far above any sequence, generation or incarnation that can be reached, far below where the catalog's integers end."""

check_of: Callable[..., int] = xxhash.xxh3_64_intdigest
"""The 64-bit checksum of a block, page or header: XXH3-64 with seed 0."""

ZERO_BLOCK = bytes(BLOCK_BYTES)
ZERO_CHECK = check_of(ZERO_BLOCK)


def segment_bytes_for(device_bytes: int) -> int:
    """The segment size of a device: about a thousandth of it, so that there are always enough to choose from."""
    size = max(MIN_SEGMENT_BYTES, min(MAX_SEGMENT_BYTES, device_bytes // 1024))
    return size // MIN_SEGMENT_BYTES * MIN_SEGMENT_BYTES
