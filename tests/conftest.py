"""What every test may rely on: failures that can be repeated, and no leftovers from the caller's environment."""

from __future__ import annotations

import os

import hypothesis
import pytest

# A failure prints the line that reproduces it. The time of one example depends on the machine, so it is no property.
hypothesis.settings.register_profile("terrace", deadline=None, print_blob=True)
hypothesis.settings.load_profile("terrace")


@pytest.fixture(autouse=True)
def _no_ambient_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TERRACE_* variable of whoever runs the tests must not point them at a real daemon."""
    for name in [name for name in os.environ if name.startswith("TERRACE_")]:
        monkeypatch.delenv(name)
