"""Sizes as people write and read them: powers of 1024, as in qemu-img and lvm, and never a silent rounding.

`10G` is 10 GiB. `GB` is refused, since for half of all readers it means 10^9.
"""

from __future__ import annotations

import re
from fractions import Fraction

from tiers.units import format_size

__all__ = ["format_size", "parse_size"]

_BLOCK_BYTES = 4096
_UNITS = "KMGTPE"
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[KMGTPE]?)(?P<suffix>i?B?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `512`, `64K`, `10G`, `10GiB` or `1.5T`. Raises ValueError with a sentence saying what is wrong.

    Zero is a size here; whether a thing may have it is for the thing to say.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        if text.strip().startswith("-"):
            raise ValueError(f"{text!r} is negative; a size is a number of bytes such as 512, 64M, 10G or 1.5T")
        raise ValueError(f"{text!r} is not a size; write a number of bytes such as 512, 64M, 10G or 1.5T")
    unit, suffix = match["unit"].upper(), match["suffix"].lower()
    if unit and suffix == "b":
        raise ValueError(f"{text!r} is ambiguous; sizes are powers of 1024: write {match['number']}{unit}")
    if suffix.startswith("i") and (not unit or suffix == "i"):
        raise ValueError(f"{text!r} is not a size; write {match['number']}{unit}{'iB' if unit else ''}")
    size_bytes = Fraction(match["number"]) * (1024 ** (_UNITS.index(unit) + 1) if unit else 1)
    if size_bytes.denominator != 1:
        # Of blocks, since that is a size that volumes and devices may have, too.
        above = -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        raise ValueError(f"{text!r} is not a whole number of bytes; the next one of 4 KiB blocks is {above}")
    return int(size_bytes)
