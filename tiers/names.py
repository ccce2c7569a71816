"""What a pool or volume may be called, and how large a volume may be."""

import errno
import re

from tiers.errors import TierError

NAME_LIMIT = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_LIMIT - 1}}}")

SECTOR_BYTES = 512
MIN_VOLUME_BYTES = 4096
MAX_VOLUME_BYTES = 1 << 50


def validate_name(kind: str, name: str) -> str:
    """Return `name` if it may name a `kind` ("pool", "volume"); raise EINVAL saying what is allowed."""
    if not _NAME.fullmatch(name):
        shown = repr(name if len(name) <= NAME_LIMIT else name[:NAME_LIMIT] + "...")
        raise TierError(
            errno.EINVAL,
            f"{shown} can't name a {kind}: use 1 to {NAME_LIMIT} of the characters A-Z a-z 0-9 . _ - and "
            f"begin with a letter or digit",
        )
    return name


def validate_volume_size(size_bytes: int) -> int:
    """Return `size_bytes` if a volume may have it; raise EINVAL naming the nearest size that it may have."""
    if not MIN_VOLUME_BYTES <= size_bytes <= MAX_VOLUME_BYTES:
        nearest = min(max(size_bytes, MIN_VOLUME_BYTES), MAX_VOLUME_BYTES)
        raise TierError(
            errno.EINVAL,
            f"a volume can't have {size_bytes} bytes: from 4096 bytes to 1 PiB are possible; nearest: {nearest}",
        )
    if size_bytes % SECTOR_BYTES:
        nearest = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        raise TierError(
            errno.EINVAL,
            f"a volume can't have {size_bytes} bytes: sizes are multiples of {SECTOR_BYTES}; nearest: {nearest}",
        )
    return size_bytes
