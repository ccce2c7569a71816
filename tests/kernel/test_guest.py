"""The Linux kernel's own NBD client, in a guest, against the real daemon. The work is in scripts/guest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

GUEST = Path(__file__).resolve().parents[2] / "scripts" / "guest"


@pytest.mark.kernel
def test_the_linux_kernel_attaches_formats_writes_trims_and_checks_a_volume() -> None:
    result = subprocess.run([GUEST], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout
