"""The Linux kernel's own NBD client, in a guest, against the real daemon. The work is in scripts/guest.

First by nbd-client; then by `terrace attach`, over restarts, kills and stops of the daemon and of the keeper.
"""

from __future__ import annotations

import pytest

from tests.system.daemon import run_script


@pytest.mark.kernel
def test_the_linux_kernel_uses_volumes_and_its_filesystems_survive_restarts_of_the_daemon() -> None:
    run_script("scripts/guest")
