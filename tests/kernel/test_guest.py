"""The Linux kernel's own NBD client, in a guest, against the real daemon. The work is in scripts/guest.

First by nbd-client; then by `terrace attach`, over restarts, kills and stops of the daemon and of the keeper.
How long an emulated machine takes depends on what runs beside it: the time it has is there to end a hang.
"""

from __future__ import annotations

import pytest

from tests.system.daemon import run_script

HANGS_S = 500


@pytest.mark.kernel
@pytest.mark.alone  # the guest's kernel must not find that a request took 60 s; emulated, it has one core to run on
@pytest.mark.timeout(HANGS_S + 100)
def test_the_linux_kernel_uses_volumes_and_its_filesystems_survive_restarts_of_the_daemon() -> None:
    run_script("scripts/guest", "--timeout", str(HANGS_S))
