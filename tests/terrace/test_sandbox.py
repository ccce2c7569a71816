"""What the unit's sandbox has to do with a refusal is said, and only there."""

from __future__ import annotations

import errno

import pytest

from terrace.sandbox import explained
from tiers import TierError

SYSTEMD = {"INVOCATION_ID": "0"}


@pytest.mark.parametrize(("number", "step"), [(errno.EROFS, "ReadWritePaths="), (errno.EACCES, "root the owner")])
def test_a_refusal_that_the_sandbox_explains_names_the_next_step(number: int, step: str) -> None:
    with pytest.raises(TierError, match=f"^creating /srv/x: no; .*{step}") as info, explained(SYSTEMD):
        raise TierError(number, "creating /srv/x: no")
    assert info.value.errno == number


@pytest.mark.parametrize(("number", "environment"), [(errno.EROFS, {}), (errno.ENOSPC, SYSTEMD)])
def test_any_other_refusal_stays_as_it_is(number: int, environment: dict[str, str]) -> None:
    with pytest.raises(TierError) as info, explained(environment):
        raise TierError(number, "creating /srv/x: no")
    assert str(info.value) == "creating /srv/x: no"
