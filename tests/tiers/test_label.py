"""The label of a device: two copies, a checksum, and no guesses."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.label import LABEL_BYTES, MAX_DEVICES, BadLabelError, Label, decode_label, encode_label, newest_label
from tiers.layout import MAX_DEVICE_BYTES, MAX_SEQ, MIN_DEVICE_BYTES, check_of, segment_bytes_for

GOLDEN = Path(__file__).parent / "golden"
UUID = st.binary(min_size=16, max_size=16)
SEQ = st.integers(0, MAX_SEQ)


@st.composite
def labels(draw: st.DrawFn) -> Label:
    size = draw(st.integers(MIN_DEVICE_BYTES, MAX_DEVICE_BYTES))
    return Label(
        draw(st.sampled_from(["fast", "base"])),
        draw(st.integers(0, MAX_DEVICES - 1)),
        draw(UUID),
        draw(UUID),
        size,
        segment_bytes_for(size),
        draw(SEQ),
        draw(SEQ),
        draw(st.frozensets(st.integers(0, MAX_DEVICES - 1))),
        draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
    )


LABELS = labels()
SAMPLE = Label(
    "base", 2, bytes(range(16)), bytes(range(16, 32)), 5 << 30, 5 << 20, 41, 123456789, frozenset({0, 9, 255}), "demo"
)


def sealed(body: bytes) -> bytes:
    """Put the right check on the first 504 bytes of a label."""
    return body[:504] + struct.pack("<Q", check_of(body[:504]))


@given(LABELS)
def test_a_label_comes_back_as_it_was(label: Label) -> None:
    encoded = encode_label(label)
    assert len(encoded) == LABEL_BYTES
    assert decode_label(encoded) == label


def test_every_flipped_bit_of_a_label_is_refused() -> None:
    encoded = bytearray(encode_label(SAMPLE))
    for bit in range(LABEL_BYTES * 8):
        encoded[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadLabelError) as caught:
            decode_label(bytes(encoded))
        assert caught.value.foreign == (bit < 64)  # without the magic it was never one of ours
        encoded[bit // 8] ^= 1 << bit % 8
    assert decode_label(bytes(encoded)) == SAMPLE


def test_a_label_cut_short_at_any_byte_is_refused() -> None:
    encoded = encode_label(SAMPLE)
    for length in range(LABEL_BYTES):
        with pytest.raises(BadLabelError):
            decode_label(encoded[:length])


@given(st.binary(max_size=1024))
def test_garbage_is_no_label(garbage: bytes) -> None:
    for sector in (garbage, b"TERRACE\0" + garbage):
        with pytest.raises(BadLabelError):
            decode_label(sector)


def test_a_label_of_a_newer_version_is_refused_by_name() -> None:
    encoded = encode_label(SAMPLE)
    with pytest.raises(BadLabelError, match="format version 2 and this release reads version 1") as caught:
        decode_label(sealed(encoded[:8] + b"\x02\x00" + encoded[10:]))
    assert not caught.value.foreign


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (10, b"\x00\x00"),
        (10, b"\x03\x00"),
        (12, b"\x00\x01\x00\x00"),
        (48, bytes(8)),
        (48, b"\xff" * 8),
        (56, bytes(8)),
        (56, struct.pack("<Q", 4096)),
        (56, struct.pack("<Q", (5 << 20) + 512)),
        (56, struct.pack("<Q", 8192)),
        (56, struct.pack("<Q", 128 << 20)),
        (64, b"\xff" * 8),
        (72, b"\xff" * 8),
    ],
    ids=[
        "no tier",
        "unknown tier",
        "device 256",
        "a device of no size",
        "a device without end",
        "segments of no size",
        "segments of a header only",
        "segments of half blocks",
        "too many segments",
        "segments too large",
        "generation without end",
        "checkpoint without end",
    ],
)
def test_a_label_with_a_sound_check_but_impossible_values_is_refused(offset: int, value: bytes) -> None:
    encoded = encode_label(SAMPLE)
    with pytest.raises(BadLabelError, match="impossible values"):
        decode_label(sealed(encoded[:offset] + value + encoded[offset + len(value) :]))


def test_a_pool_name_that_is_no_text_is_refused() -> None:
    encoded = encode_label(SAMPLE)
    with pytest.raises(BadLabelError, match="no text"):
        decode_label(sealed(encoded[:112] + b"\xff" + encoded[113:]))


def test_the_valid_copy_with_the_higher_generation_counts() -> None:
    older, newer = encode_label(SAMPLE), encode_label(SAMPLE.next(checkpoint_seq=7))
    torn = newer[:100] + bytes(LABEL_BYTES - 100)
    for pair in ([older, newer], [newer, older]):
        assert newest_label(pair) == SAMPLE.next(checkpoint_seq=7)
    for pair in ([older, torn], [torn, older], [older, b""], [bytes(512), older]):
        assert newest_label(pair) == SAMPLE


def test_without_a_valid_copy_the_most_telling_reason_is_given() -> None:
    torn = encode_label(SAMPLE)[:100].ljust(LABEL_BYTES, b"\0")
    for pair in ([torn, bytes(512)], [bytes(512), torn]):
        with pytest.raises(BadLabelError, match="fails its checksum"):
            newest_label(pair)
    with pytest.raises(BadLabelError, match="no Terrace label"):
        newest_label([bytes(512), b""])


def test_next_supersedes_and_changes_only_what_it_is_told_to() -> None:
    following = SAMPLE.next(poisoned=frozenset({1}))
    assert following.generation == SAMPLE.generation + 1
    assert (following.poisoned, following.checkpoint_seq) == (frozenset({1}), SAMPLE.checkpoint_seq)
    assert following.next(checkpoint_seq=5).poisoned == frozenset({1})


def test_the_label_of_version_1_is_these_bytes() -> None:
    image = bytes.fromhex((GOLDEN / "v1-label.hex").read_text())
    assert encode_label(SAMPLE) == image
    bits = (1 << 0 | 1 << 9 | 1 << 255).to_bytes(32, "little")
    assert struct.unpack_from("<8sHHI16s16sQQQQ32s64s", image) == (
        b"TERRACE\0", 1, 2, 2, bytes(range(16)), bytes(range(16, 32)), 5 << 30, 5 << 20, 41, 123456789, bits,
        b"demo".ljust(64, b"\0"),
    )  # fmt: skip
    assert image[176:504] == bytes(328)
    assert struct.unpack_from("<Q", image, 504) == (check_of(image[:504]),)


def test_a_copy_that_a_newer_release_wrote_is_not_passed_over_for_an_older_one() -> None:
    old = encode_label(SAMPLE)
    upgraded = encode_label(SAMPLE.next())
    upgraded = sealed(upgraded[:8] + b"\x02\x00" + upgraded[10:])
    for pair in ([old, upgraded], [upgraded, old]):
        with pytest.raises(BadLabelError, match="format version 2"):
            newest_label(pair)
