"""The Linux kernel's own NBD client, in a guest, against the real daemon. The work is in scripts/guest."""

from __future__ import annotations

import subprocess

import pytest

from tests.system.daemon import REPOSITORY, environment


@pytest.mark.kernel
def test_the_linux_kernel_attaches_formats_writes_trims_and_checks_a_volume() -> None:
    result = subprocess.run(
        ["scripts/guest"],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
