"""The names of all failpoints: found in the engine's source, so that none can be forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import tiers

_HIT = re.compile(r'\bhit\("([a-z_]+\.[a-z_]+)"\)')


def failpoint_names() -> list[str]:
    """Every name that the engine hits, sorted."""
    package = Path(tiers.__file__).parent
    return sorted({name for path in package.glob("*.py") for name in _HIT.findall(path.read_text())})
