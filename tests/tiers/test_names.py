"""What pools and volumes may be called, and how large a volume may be: refusals name the nearest thing that works."""

import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiers
from tiers import TierError, validate_name, validate_volume_size


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_good_names_are_returned(name: str) -> None:
    assert validate_name("volume", name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "a\nb", "a\n", "\na", "x" * 300, "x" * 65, ".", "..", ".hidden", "-rf", "_x", "a b", "a@b", "é", "a\0"],
)
def test_bad_names_are_refused_in_one_line_that_says_what_is_allowed(name: str) -> None:
    with pytest.raises(TierError) as caught:
        validate_name("volume", name)
    text = str(caught.value)
    assert caught.value.errno == errno.EINVAL
    assert "can't name a volume" in text
    assert "A-Z a-z 0-9" in text
    assert "\n" not in text
    assert len(text) < 300


@given(st.text(max_size=80))
def test_a_name_is_good_exactly_if_the_rule_says_so(name: str) -> None:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        validate_name("pool", name)
    else:
        with pytest.raises(TierError):
            validate_name("pool", name)


@pytest.mark.parametrize("size", [4096, 4608, 1 << 20, 10 << 40, 1 << 50])
def test_good_sizes_are_returned(size: int) -> None:
    assert validate_volume_size(size) == size


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        (0, 4096), (-1, 4096), (7, 4096), (4095, 4096), (4097, 4608), (10_000, 10_240),
        ((1 << 50) + 1, 1 << 50), (1 << 63, 1 << 50), ((1 << 64) - 1, 1 << 50), (-(1 << 63), 4096),
    ],
)  # fmt: skip
def test_bad_sizes_are_refused_with_the_nearest_good_one(size: int, nearest: int) -> None:
    with pytest.raises(TierError) as caught:
        validate_volume_size(size)
    assert caught.value.errno == errno.EINVAL
    assert str(size) in str(caught.value)
    assert str(caught.value).endswith(f"nearest: {nearest}")
    assert validate_volume_size(nearest) == nearest


def test_what_the_package_offers_is_there() -> None:
    for name in tiers.__all__:
        assert getattr(tiers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Pond'"):
        _ = tiers.Pond
