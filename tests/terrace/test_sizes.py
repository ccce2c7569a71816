"""Sizes: what is read is what was meant, and what is not clear is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terrace.sizes import format_size, parse_size
from tiers.names import validate_volume_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("10G", 10 << 30),
        ("10GiB", 10 << 30),
        ("10 GiB", 10 << 30),
        ("1.5T", 3 << 39),
        ("0.1K", None),
        ("8E", 1 << 63),
    ],
)
def test_sizes_are_powers_of_1024_and_never_rounded(text: str, size_bytes: int | None) -> None:
    if size_bytes is None:
        with pytest.raises(ValueError, match="whole number of bytes"):
            parse_size(text)
    else:
        assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", " ", "-1", "-1G", "+1", "ten", "1e9", "10X", "0x1", "1,5G", "1_0", "٣", "10Gi"])
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_size(text)
    assert repr(text) in str(refusal.value)


def test_decimal_units_are_refused_because_they_mean_two_things() -> None:
    with pytest.raises(ValueError, match="write 10G"):
        parse_size("10GB")


@given(st.integers(0, 1 << 70))
def test_a_formatted_size_is_within_half_a_percent_and_reads_back(size_bytes: int) -> None:
    shown = format_size(size_bytes)
    number, unit = shown.split(" ")
    assert len(number) <= 4 or size_bytes >= 1 << 70
    power = "KMGTPE".find(unit[0]) + 1 if unit != "B" else 0
    assert abs(float(number) * 1024**power - size_bytes) <= size_bytes * 0.005


@given(st.integers(0, 1 << 20), st.sampled_from(["", "K", "M", "G", "T"]))
def test_whole_units_read_back_exactly(count: int, unit: str) -> None:
    power = " KMGT".index(unit or " ")
    assert parse_size(f"{count}{unit}") == count * 1024**power


def test_the_size_that_is_proposed_for_a_broken_one_is_one_that_a_volume_may_have() -> None:
    for text in ("3.3G", "0.0000001G", "1.1T", "4096.7K"):
        with pytest.raises(ValueError, match="whole number of bytes") as caught:
            parse_size(text)
        proposed = int(str(caught.value).split()[-1])
        assert validate_volume_size(proposed) == parse_size(str(proposed)) == proposed
