"""Packages that not everybody needs: what to say where one is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = {
    "pyfuse3": "pyfuse3>=3.4,<4",
    "matplotlib": "matplotlib>=3.9,<4",
    "cryptography": "cryptography>=43,<51",
}
"""As the extras in pyproject.toml have them (tests/terrace/test_extras.py compares)."""


def how_to_install(package: str) -> str:
    """The command that installs it for this very Python; there may be others on the PATH."""
    pip = Path(sys.prefix) / "bin" / "pip"
    called = str(pip) if pip.exists() else f"{sys.executable} -m pip"
    return f"{called} install '{REQUIREMENTS[package]}'"
