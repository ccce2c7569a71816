"""The Linux kernel's own NBD client, in a guest, against the real daemon. The work is in scripts/guest.

First by nbd-client; then by `terrace attach`, over restarts, kills and stops of the daemon and of the keeper.
"""

from __future__ import annotations

import subprocess

import pytest

from tests.system.daemon import REPOSITORY, environment


@pytest.mark.kernel
def test_the_linux_kernel_uses_volumes_and_its_filesystems_survive_restarts_of_the_daemon() -> None:
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
