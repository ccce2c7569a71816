"""The label of a device: which pool it belongs to, which of its devices it is, and how it is carved.

Two copies of one sector each stand at offsets 0 and 4096. An update writes the older one, so a torn write leaves the
other; the valid copy with the higher generation counts. Little-endian.

    offset size type  field
      0     8   bytes  magic "TERRACE\\0"
      8     2   u16    format version (1); another version is refused, never guessed at
     10     2   u16    tier: 1 fast, 2 base
     12     4   u32    device index in the pool
     16    16   bytes  pool uuid
     32    16   bytes  device uuid
     48     8   u64    device size in bytes when it joined
     56     8   u64    segment size in bytes
     64     8   u64    generation of this label
     72     8   u64    sequence of the newest committed checkpoint: an older catalog is refused
     80    32   bytes  poisoned devices of the pool, a bit each (index 0-255)
    112    64   bytes  pool name, UTF-8, zero-padded
    176   328          zeros
    504     8   u64    XXH3-64 of bytes 0-503
"""

import struct
from dataclasses import dataclass, replace
from typing import Literal

from tiers.layout import BLOCK_BYTES, LABEL_AREA_BYTES, MAX_DEVICE_BYTES, MAX_SEGMENT_BYTES, MAX_SEQ, check_of

Tier = Literal["fast", "base"]

LABEL_VERSION = 1
LABEL_BYTES = 512
LABEL_OFFSETS = (0, 4096)
MAGIC = b"TERRACE\0"
MAX_DEVICES = 256

_LABEL = struct.Struct("<8sHHI16s16sQQQQ32s64s")
assert _LABEL.size == 176
_CHECK = struct.Struct("<Q")
_TIERS: tuple[Tier, Tier] = ("fast", "base")


class BadLabelError(Exception):
    """The sector holds no label that this release can use; the text says why.

    `foreign`: it was never one. `newer`: it is sound, of another version.
    """

    def __init__(self, why: str, *, foreign: bool = False, newer: bool = False) -> None:
        super().__init__(why)
        self.foreign = foreign
        self.newer = newer


@dataclass(frozen=True, slots=True)
class Label:
    """A label that passed its check."""

    tier: Tier
    device_index: int
    pool_uuid: bytes
    device_uuid: bytes
    size_bytes: int
    segment_bytes: int
    generation: int
    checkpoint_seq: int
    poisoned: frozenset[int]
    pool_name: str

    def next(self, *, checkpoint_seq: int | None = None, poisoned: frozenset[int] | None = None) -> "Label":
        """The label that supersedes this one."""
        return replace(
            self,
            generation=self.generation + 1,
            checkpoint_seq=self.checkpoint_seq if checkpoint_seq is None else checkpoint_seq,
            poisoned=self.poisoned if poisoned is None else poisoned,
        )


def encode_label(label: Label) -> bytes:
    """Return the sector of a label."""
    bits = sum(1 << index for index in label.poisoned)
    body = _LABEL.pack(
        MAGIC,
        LABEL_VERSION,
        _TIERS.index(label.tier) + 1,
        label.device_index,
        label.pool_uuid,
        label.device_uuid,
        label.size_bytes,
        label.segment_bytes,
        label.generation,
        label.checkpoint_seq,
        bits.to_bytes(32, "little"),
        label.pool_name.encode(),
    ).ljust(LABEL_BYTES - _CHECK.size, b"\0")
    return body + _CHECK.pack(check_of(body))


def decode_label(sector: bytes) -> Label:
    """Judge one label sector. Raises BadLabelError."""
    if len(sector) < LABEL_BYTES or sector[:8] != MAGIC:
        raise BadLabelError("it carries no Terrace label", foreign=True)
    (check,) = _CHECK.unpack_from(sector, LABEL_BYTES - _CHECK.size)
    if check != check_of(sector[: LABEL_BYTES - _CHECK.size]):
        raise BadLabelError("its label fails its checksum")
    _, version, tier, index, pool, device, size, segment, generation, checkpoint, bits, name = _LABEL.unpack_from(
        sector
    )
    if version != LABEL_VERSION:
        raise BadLabelError(
            f"its label has format version {version} and this release reads version {LABEL_VERSION}; use the "
            "release that wrote it",
            newer=True,
        )
    try:
        pool_name = name.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise BadLabelError("its label has a pool name that is no text") from None
    if (
        tier not in (1, 2)
        or index >= MAX_DEVICES
        or not 2 * BLOCK_BYTES <= segment <= MAX_SEGMENT_BYTES
        or segment % BLOCK_BYTES
        or not LABEL_AREA_BYTES + segment <= size <= MAX_DEVICE_BYTES
        or size // segment > max(2048, size // MAX_SEGMENT_BYTES)  # no device is carved finer than a thousandth
        or max(generation, checkpoint) > MAX_SEQ
    ):
        raise BadLabelError("its label has impossible values")
    poisoned = int.from_bytes(bits, "little")
    return Label(
        _TIERS[tier - 1],
        index,
        pool,
        device,
        size,
        segment,
        generation,
        checkpoint,
        frozenset(i for i in range(MAX_DEVICES) if poisoned >> i & 1),
        pool_name,
    )


def newest_label(sectors: list[bytes]) -> Label:
    """Return the valid label with the highest generation. Raises BadLabelError with the most telling reason.

    A sound copy of another version is a refusal, even if the other copy could be read: that one is stale.
    """
    labels: list[Label] = []
    reasons: list[BadLabelError] = []
    for sector in sectors:
        try:
            labels.append(decode_label(sector))
        except BadLabelError as error:
            if error.newer:
                raise
            reasons.append(error)
    if labels:
        return max(labels, key=lambda label: label.generation)
    raise min(reasons, key=lambda reason: reason.foreign)
