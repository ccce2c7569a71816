"""The codecs of what is appended to segments: what goes in comes out, and nothing else is ever believed."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiers.frames import FIRST_SLOT_LIMIT, MAX_FRAME_BLOCKS, Frame, slots_of
from tiers.layout import BLOCK_BYTES, MAX_SEGMENT_ID, MAX_SEQ, check_of
from tiers.maptree import page_key
from tiers.record import (
    MAX_BLOCKS,
    MAX_HEADER_SLOTS,
    MAX_SLOTS,
    MAX_TIME_S,
    BadRecordError,
    Batch,
    Kind,
    Op,
    decode_batch,
    decode_checks,
    decode_segment_header,
    encode_batch,
    encode_segment_header,
    frame_words,
    header_slots_for,
    peek_header_slots,
    words_from_name,
)

GOLDEN = Path(__file__).parent / "golden"
POOL = bytes(range(16))
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
SEQ = st.integers(0, MAX_SEQ)
VOLUME = st.integers(0, 2**56 - 1)
SEGMENT = st.integers(1, MAX_SEGMENT_ID)
SIZE = st.integers(8, 2**41).map(lambda sectors: sectors * 512)
OPS = {
    Kind.LOG: sorted(set(Op) - {Op.PAGE, Op.CATALOG}),
    Kind.MOVED: [Op.WRITE],
    Kind.MAP: [Op.PAGE],
    Kind.CATALOG: [Op.CATALOG],
    Kind.PACKED: [Op.WRITE],
}


@st.composite
def operation(draw: st.DrawFn, kind: Kind) -> tuple[list[int], int, list[int]]:
    """(three words, data blocks, extra words) of a sound operation."""
    op = draw(st.sampled_from(OPS[kind]))
    a, b = draw(U64), draw(U64)
    subject = draw(SEGMENT if op in (Op.LINK, Op.MOVE, Op.RELOCATE) else VOLUME)
    blocks, extra = 0, []
    if op in (Op.WRITE, Op.CATALOG):
        b = blocks = draw(st.integers(0, 40))
        a = draw(st.integers(0, MAX_BLOCKS - b))
    elif op is Op.REWRITE:
        b = blocks = draw(st.integers(0, 40))
        a = draw(st.integers(0, MAX_BLOCKS - b))
        extra = draw(st.lists(U64, min_size=b, max_size=b))
    elif op is Op.LOST:
        a = draw(st.integers(0, MAX_BLOCKS - 1))
    elif op is Op.BAD:
        b = draw(st.integers(0, MAX_SLOTS))
        a = draw(st.integers(0, MAX_BLOCKS - b))
    elif op is Op.PAGE:
        blocks = 1
    elif op is Op.RESIZE:
        a = draw(SIZE)
    elif op is Op.CREATE:
        a = draw(SIZE)
        name = draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)).encode()
        b = draw(st.integers(0, MAX_TIME_S)) << 8 | len(name)
        extra = [int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8)]
    elif op is Op.POLICY:
        policy = draw(st.from_regex(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})?", fullmatch=True))
        a, extra = len(policy), words_from_name(policy)
    elif op is Op.FILLING:
        a = draw(st.integers(0, 1))
    elif op in (Op.MOVE, Op.RELOCATE):
        count = draw(st.integers(0, 300))
        a = draw(st.integers(0, MAX_SLOTS - 1)) << 32 | count
        extra = draw(st.lists(U64, min_size=1 + -(-count // 64), max_size=1 + -(-count // 64)))
        if op is Op.RELOCATE:
            olds = sum(word.bit_count() for word in extra[1:])
            extra = extra + draw(st.lists(U64, min_size=olds, max_size=olds))
    return [op << 56 | subject, a, b], blocks, extra


@st.composite
def batches(draw: st.DrawFn) -> tuple[Kind, list[int], list[int], list[int]]:
    kind = draw(st.sampled_from(list(Kind)))
    parts = draw(st.lists(operation(kind), max_size=12))
    ops = [word for words, _, _ in parts for word in words]
    block_count = sum(blocks for _, blocks, _ in parts)
    checks = draw(st.lists(U64, min_size=block_count, max_size=block_count))
    if kind is Kind.PACKED:
        return kind, ops, checks, frame_words(draw(frame_table(block_count)))
    return kind, ops, checks, [word for _, _, extra in parts for word in extra]


@st.composite
def frame_table(draw: st.DrawFn, block_count: int) -> list[Frame]:
    frames = []
    while block_count:
        blocks = draw(st.integers(1, min(MAX_FRAME_BLOCKS, block_count)))
        frames.append(Frame(blocks, draw(st.integers(1, MAX_FRAME_BLOCKS)), draw(U64)))
        block_count -= blocks
    return frames


def sealed(header: bytearray) -> bytearray:
    """Put the right check on a batch header that was tampered with."""
    header[96:104] = bytes(8)
    header[96:104] = struct.pack("<Q", check_of(header))
    return header


def sealed_segment(header: bytes) -> bytes:
    """The same for a segment header."""
    return header[:72] + struct.pack("<Q", check_of(header[:72])) + header[80:]


# -- segment headers -------------------------------------------------------------------------------------------------


@given(st.sampled_from(list(Kind)), U32, st.binary(min_size=16, max_size=16), st.tuples(SEGMENT, U64, SEQ, SEQ, SEQ))
def test_a_segment_header_comes_back_as_it_was(
    kind: Kind, device: int, pool: bytes, numbers: tuple[int, int, int, int, int]
) -> None:
    encoded = encode_segment_header(kind, device, pool, *numbers)
    assert len(encoded) == BLOCK_BYTES
    found = decode_segment_header(encoded, pool)
    assert (found.kind, found.device_index) == (kind, device)
    assert (
        found.segment_id,
        found.physical_index,
        found.incarnation,
        found.checkpoint_seq,
        found.first_seq,
    ) == numbers


def sample_segment_header() -> bytes:
    return encode_segment_header(Kind.LOG, 3, POOL, 0x1122334455, 77, 5, 1000, 1007)


def test_every_flipped_bit_of_a_segment_header_is_refused() -> None:
    encoded = bytearray(sample_segment_header())
    for bit in range(80 * 8):
        encoded[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadRecordError):
            decode_segment_header(encoded, POOL)
        encoded[bit // 8] ^= 1 << bit % 8
    decode_segment_header(encoded, POOL)


def test_a_segment_header_of_another_version_pool_or_kind_is_refused() -> None:
    good = sample_segment_header()
    with pytest.raises(BadRecordError, match="segment format 2, this release reads 1"):
        decode_segment_header(sealed_segment(good[:8] + b"\x02\x00" + good[10:]), POOL)
    with pytest.raises(BadRecordError, match="another pool"):
        decode_segment_header(good, bytes(16))
    with pytest.raises(BadRecordError, match="kind 9"):
        decode_segment_header(sealed_segment(good[:10] + b"\x09\x00" + good[12:]), POOL)


@given(st.binary(max_size=200))
def test_garbage_after_the_magic_is_refused_too(garbage: bytes) -> None:
    with pytest.raises(BadRecordError):
        decode_segment_header((b"TRCSEGM1" + garbage).ljust(BLOCK_BYTES, b"\0"), POOL)
    block = (b"TRCBATC1" + garbage).ljust(BLOCK_BYTES, b"\0")
    assert 0 <= peek_header_slots(block) <= MAX_HEADER_SLOTS
    with pytest.raises(BadRecordError):
        decode_batch(block, POOL, 1, 1)


# -- batches ---------------------------------------------------------------------------------------------------------


@given(batches(), st.tuples(U64, U64, SEQ, SEQ, U64, SEQ))
def test_a_batch_comes_back_as_it_was(
    content: tuple[Kind, list[int], list[int], list[int]], numbers: tuple[int, int, int, int, int, int]
) -> None:
    kind, ops, checks, extra = content
    segment, slot, incarnation, seq, prev_check, durable_seq = numbers
    if kind is Kind.PACKED:
        slot %= FIRST_SLOT_LIMIT // 2
    encoded, check = encode_batch(
        kind, POOL, segment, slot, incarnation, seq, prev_check, durable_seq, ops, checks, extra
    )
    slots = header_slots_for(len(ops) // 3, len(checks), len(extra))
    assert len(encoded) == slots * BLOCK_BYTES
    assert peek_header_slots(encoded[:BLOCK_BYTES]) == slots
    found = decode_batch(encoded + b"what follows on the device", POOL, segment, slot)
    assert found == Batch(
        kind, slots, segment, slot, incarnation, seq, prev_check, durable_seq, ops, checks, extra, check
    )
    assert found.slots == slots + (sum(f.slots for f in found.frames()) if kind is Kind.PACKED else len(checks))
    assert decode_checks(encoded, POOL, segment, slot) == (slots, checks, found.frames() if kind is Kind.PACKED else [])
    places = found.places()
    assert len(set(places)) == len(places) == len(checks)
    if kind is Kind.PACKED:
        ends = [first + count for first, count in map(slots_of, places)]
        assert all(slot + slots < end <= slot + found.slots for end in ends)
    else:
        assert places == list(range(slot + slots, slot + found.slots))
    assert [word for op, subject, a, b in found.operations() for word in (op << 56 | subject, a, b)] == ops


def sample_batch() -> bytearray:
    encoded, _ = encode_batch(
        Kind.LOG, POOL, 9, 4, 2, 30, 111, 25, [Op.WRITE << 56 | 1, 10, 2, Op.UNMAP << 56 | 1, 50, 9], [7, 8], []
    )
    return encoded


def test_every_flipped_bit_of_a_batch_header_is_refused() -> None:
    encoded = sample_batch()
    for bit in range(len(encoded) * 8):
        encoded[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadRecordError):
            decode_batch(encoded, POOL, 9, 4)
        encoded[bit // 8] ^= 1 << bit % 8
    decode_batch(encoded, POOL, 9, 4)


def test_a_batch_of_many_slots_is_refused_if_one_is_missing_or_torn() -> None:
    encoded, _ = encode_batch(Kind.LOG, POOL, 9, 4, 2, 30, 0, 0, [Op.WRITE << 56 | 1, 0, 1500], list(range(1500)), [])
    assert len(encoded) == 3 * BLOCK_BYTES
    for cut in (BLOCK_BYTES, 2 * BLOCK_BYTES):
        with pytest.raises(BadRecordError, match="cut short"):
            decode_batch(encoded[:cut], POOL, 9, 4)
        with pytest.raises(BadRecordError, match="fails its check"):
            decode_batch(encoded[:cut] + bytes(3 * BLOCK_BYTES - cut), POOL, 9, 4)


def test_a_batch_that_stands_where_it_should_not_is_refused() -> None:
    for pool, segment, slot in ((bytes(16), 9, 4), (POOL, 8, 4), (POOL, 9, 5)):
        with pytest.raises(BadRecordError, match="belongs elsewhere"):
            decode_batch(sample_batch(), pool, segment, slot)


def rewritten(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(header: bytearray) -> None:
        struct.pack_into(layout, header, offset, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rewritten(8, "<H", 2), "batch format 2, this release reads 1"),
        (rewritten(10, "<H", 0), "impossible counts"),
        (rewritten(12, "<H", 0), "cut short"),
        (rewritten(12, "<H", 65), "cut short"),
        (rewritten(80, "<I", 0), "do not match"),
        (rewritten(80, "<I", 2**32 - 1), "impossible counts"),
        (rewritten(84, "<I", 3), "do not match"),
        (rewritten(84, "<I", 2**31), "impossible counts"),
        (rewritten(88, "<I", 1), "do not match"),
        (rewritten(104, "<Q", 16 << 56 | 1), "unknown operation 16"),
        (rewritten(104, "<Q", 1), "unknown operation 0"),
        (rewritten(104 + 16, "<Q", 3), "do not match"),
        (rewritten(104 + 16, "<Q", 2**64 - 1), "no volume has"),
    ],
)
def test_a_batch_with_a_sound_check_but_senseless_fields_is_refused(
    change: Callable[[bytearray], None], reason: str
) -> None:
    header = sample_batch()
    change(header)
    with pytest.raises(BadRecordError, match=reason):
        decode_batch(sealed(header), POOL, 9, 4)


def words_of(name: bytes) -> list[int]:
    return [int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8)]


@pytest.mark.parametrize(
    ("kind", "ops", "checks", "extra", "reason"),
    [
        (Kind.LOG, [Op.PAGE << 56 | 1, 0, 0], [1], [], "PAGE in a batch of kind LOG"),
        (Kind.MOVED, [Op.UNMAP << 56 | 1, 0, 1], [], [], "UNMAP in a batch of kind MOVED"),
        (Kind.MAP, [Op.WRITE << 56 | 1, 0, 1], [1], [], "WRITE in a batch of kind MAP"),
        (Kind.CATALOG, [Op.WRITE << 56 | 1, 0, 1], [1], [], "WRITE in a batch of kind CATALOG"),
        (Kind.PACKED, [Op.UNMAP << 56 | 1, 0, 1], [], [], "UNMAP in a batch of kind PACKED"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, MAX_BLOCKS, 1], [1], [1 << 32 | 1, 0], "no volume has"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 3], [1, 2], [2 << 32 | 1, 0], "do not match"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 2], [1, 2], [3 << 32 | 1, 0], "frame table"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 2], [1, 2], [2 << 32 | 1], "frame table"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 2], [1, 2], [2 << 32, 0], "frame table"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 2], [1, 2], [2 << 32 | 33, 0], "frame table"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 2], [1, 2], [2 << 32 | 1, 0, 1, 0], "frame table"),
        (Kind.PACKED, [Op.WRITE << 56 | 1, 0, 33], list(range(33)), [33 << 32 | 1, 0], "frame table"),
        (Kind.PACKED, [], [], [7 << 56, 7 << 56], "frame table"),
        (Kind.LOG, [Op.WRITE << 56 | 1, MAX_BLOCKS, 1], [1], [], "no volume has"),
        (Kind.LOG, [Op.WRITE << 56 | 1, 2**64 - 1, 1], [1], [], "no volume has"),
        (Kind.LOG, [Op.BAD << 56 | 1, 0, 2**63], [], [], "no volume has"),
        (Kind.LOG, [Op.BAD << 56 | 1, MAX_BLOCKS - 1, 2], [], [], "no volume has"),
        (Kind.LOG, [Op.RESIZE << 56 | 1, 2**60, 0], [], [], "can't have"),
        (Kind.LOG, [Op.RESIZE << 56 | 1, 4097, 0], [], [], "can't have"),
        (Kind.LOG, [Op.CREATE << 56 | 1, 2**60, 1], [], words_of(b"a"), "can't have"),
        (Kind.LOG, [Op.CREATE << 56 | 1, 4096, 2], [], words_of(b"\xff\xfe"), "name is damaged"),
        (Kind.LOG, [Op.CREATE << 56 | 1, 4096, 3], [], words_of(b"a/b"), "name is damaged"),
        (Kind.LOG, [Op.CREATE << 56 | 1, 4096, 0], [], [], "name is damaged"),
        (Kind.LOG, [Op.CREATE << 56 | 1, 4096, 2**63 | 1], [], words_of(b"a"), "after 1970"),
        (Kind.LOG, [Op.POLICY << 56 | 1, 3, 0], [], words_of(b"a/b"), "policy's name is damaged"),
        (Kind.LOG, [Op.POLICY << 56 | 1, 2, 0], [], words_of(b"\xff\xfe"), "policy's name is damaged"),
        (Kind.LOG, [Op.POLICY << 56 | 1, 65, 0], [], words_of(b"a" * 65), "policy's name is damaged"),
        (Kind.LOG, [Op.POLICY << 56 | 1, 2**64 - 1, 0], [], words_of(b"abcdefgh"), "do not match"),
        (Kind.LOG, [Op.POLICY << 56 | 1, 0, 0], [], words_of(b"a"), "do not match"),
        (Kind.MOVED, [Op.POLICY << 56 | 1, 0, 0], [], [], "POLICY in a batch of kind MOVED"),
        (Kind.LOG, [Op.FILLING << 56 | 1, 2, 0], [], [], "a mark of being filled that is 2"),
        (Kind.MOVED, [Op.FILLING << 56 | 1, 1, 0], [], [], "FILLING in a batch of kind MOVED"),
        (Kind.LOG, [Op.LINK << 56, 0, 0], [], [], "link to segment 0"),
        (Kind.LOG, [Op.LINK << 56 | 2**40, 0, 0], [], [], "link to segment"),
        (Kind.LOG, [Op.MOVE << 56 | 2**40, 0, 0], [], [0], "move into segment"),
        (Kind.LOG, [Op.MOVE << 56 | 1, 2**60, 0], [], [0], "move into segment"),
    ],
)
def test_an_operation_that_no_release_writes_is_refused(
    kind: Kind, ops: list[int], checks: list[int], extra: list[int], reason: str
) -> None:
    encoded, _ = encode_batch(kind, POOL, 9, 4, 2, 30, 0, 25, ops, checks, extra)
    with pytest.raises(BadRecordError, match=reason):
        decode_batch(encoded, POOL, 9, 4)


def test_frames_that_no_address_can_name_are_refused() -> None:
    for slot, count in ((FIRST_SLOT_LIMIT - 33, True), (FIRST_SLOT_LIMIT - 32, False)):
        encoded, _ = encode_batch(
            Kind.PACKED, POOL, 9, slot, 2, 30, 0, 25, [Op.WRITE << 56 | 1, 0, 2], [1, 2], [2 << 32 | 32, 0]
        )
        if count:
            assert decode_batch(encoded, POOL, 9, slot).slots == 33
        else:
            with pytest.raises(BadRecordError, match="frame table"):
                decode_batch(encoded, POOL, 9, slot)
            with pytest.raises(BadRecordError, match="frame table"):
                decode_checks(encoded, POOL, 9, slot)


@pytest.mark.parametrize("offset", [48, 56, 72])
def test_numbers_that_the_catalog_could_not_hold_are_refused(offset: int) -> None:
    header = sample_batch()
    struct.pack_into("<Q", header, offset, MAX_SEQ + 1)
    with pytest.raises(BadRecordError, match="impossible values"):
        decode_batch(sealed(header), POOL, 9, 4)


# -- golden images ---------------------------------------------------------------------------------------------------


def golden(name: str, size: int) -> bytes:
    """A golden image: hex text without the zeros at its end."""
    return bytes.fromhex((GOLDEN / name).read_text()).ljust(size, b"\0")


NAME = int.from_bytes(b"vol-1\0\0\0", "little")
LOG_OPS = [
    (Op.WRITE << 56 | 5, 0x0102030405, 2),
    (Op.UNMAP << 56 | 5, 4096, 1 << 40),
    (Op.RESIZE << 56 | 5, 10 << 40, 0),
    (Op.CREATE << 56 | 6, 2 << 30, 1_700_000_000 << 8 | 5),
    (Op.DELETE << 56 | 4, 0, 0),
    (Op.LINK << 56 | 0x0A0B0C0D, 3 << 32 | 17, 0),
    (Op.MOVE << 56 | 99, 33 << 32 | 70, 0xFFEEDDCCBBAA9988),
    (Op.BAD << 56 | 5, 12, 1),
]
LOG_BATCH = (
    [word for operation in LOG_OPS for word in operation],
    [0x1111111111111111, 0x8222222222222222],
    [NAME, 1 << 32 | 8, 0xF0F0F0F0F0F0F0F0, 0x3F],
)
BATCHES = {
    "v1-batch-log.hex": (Kind.LOG, 7, 3, 2, 1001, 0xDEADBEEFCAFEF00D, 990, *LOG_BATCH),
    "v1-batch-moved.hex": (Kind.MOVED, 99, 33, 2, 1002, 0, 1001, [Op.WRITE << 56 | 5, 100, 3], [1, 2, 3], []),
    "v1-batch-map.hex": (
        Kind.MAP,
        12,
        1,
        2,
        1003,
        0,
        1001,
        [Op.PAGE << 56 | 5, page_key(0, 900), 0, Op.PAGE << 56 | 5, page_key(4, 0), 0],
        [0xA, 0xB],
        [],
    ),
    "v1-batch-policy.hex": (
        Kind.LOG,
        7,
        9,
        2,
        1005,
        0xDEADBEEFCAFEF00D,
        990,
        [Op.CREATE << 56 | 6, 2 << 30, 1_700_000_000 << 8 | 5, Op.POLICY << 56 | 6, 9, 0, Op.POLICY << 56 | 5, 0, 0],
        [],
        [NAME, *words_of(b"gold-fast")],
    ),
    "v1-batch-filling.hex": (
        Kind.LOG,
        7,
        10,
        2,
        1006,
        0xDEADBEEFCAFEF00D,
        990,
        [
            *(Op.CREATE << 56 | 6, 2 << 30, 1_700_000_000 << 8 | 5),
            *(Op.FILLING << 56 | 6, 1, 0),
            *(Op.FILLING << 56 | 5, 0, 0),
        ],
        [],
        [NAME],
    ),
    "v1-batch-relocate.hex": (
        Kind.LOG,
        7,
        11,
        2,
        1006,
        0xDEADBEEFCAFEF00D,
        990,
        [
            *(Op.RELOCATE << 56 | 99, 33 << 32 | 70, 0xFFEEDDCCBBAA9988),
            *(Op.LOST << 56 | 5, 12, 7 << 24 | 9),
            *(Op.REWRITE << 56 | 5, 100, 2),
        ],
        [0xE, 0xF],
        [1 << 32 | 8, 0x8000000000000001, 0x20, 3 << 24 | 1, 3 << 24 | 2, 3 << 24 | 3, 4 << 24 | 1, 4 << 24 | 2],
    ),
    "v1-batch-packed.hex": (
        Kind.PACKED,
        14,
        7,
        2,
        1005,
        0,
        1001,
        [Op.WRITE << 56 | 5, 100, 3, Op.WRITE << 56 | 6, 9, 2],
        [1, 2, 3, 4, 5],
        [3 << 32 | 1, 0xABCD, 2 << 32 | 1, 0xEF01],
    ),
    "v1-batch-catalog.hex": (Kind.CATALOG, 13, 5, 2, 1004, 0, 1001, [Op.CATALOG << 56 | 0, 1003, 2], [0xC, 0xD], []),
}


def test_the_segment_header_of_version_1_is_these_bytes() -> None:
    image = golden("v1-segment-header.hex", BLOCK_BYTES)
    assert sample_segment_header() == image
    assert struct.unpack_from("<8sHHI16sQQQQQ", image) == (
        b"TRCSEGM1", 1, 1, 3, POOL, 0x1122334455, 77, 5, 1000, 1007,
    )  # fmt: skip
    assert struct.unpack_from("<Q", image, 72) == (check_of(image[:72]),)
    assert image[80:] == bytes(4016)


@pytest.mark.parametrize("name", sorted(BATCHES))
def test_the_batches_of_version_1_are_these_bytes(name: str) -> None:
    kind, segment, slot, incarnation, seq, prev_check, durable_seq, ops, checks, extra = BATCHES[name]
    image = golden(name, BLOCK_BYTES)
    encoded, check = encode_batch(
        kind, POOL, segment, slot, incarnation, seq, prev_check, durable_seq, ops, checks, extra
    )
    assert bytes(encoded) == image
    found = decode_batch(image, POOL, segment, slot)
    assert (found.ops, found.checks, found.extra, found.check) == (ops, checks, extra, check)
    # The table of the format, read independently of the codec.
    assert struct.unpack_from("<8sHHHH16sQQQQQQIIII", image) == (
        b"TRCBATC1", 1, int(kind), 1, 0, POOL, segment, slot, incarnation, seq, prev_check, durable_seq,
        len(ops) // 3, len(checks), len(extra), 0,
    )  # fmt: skip
    assert struct.unpack_from("<Q", image, 96) == (check_of(image[:96] + bytes(8) + image[104:]),)
    words = ops + checks + extra
    assert list(struct.unpack_from(f"<{len(words)}Q", image, 104)) == words
    assert image[104 + 8 * len(words) :] == bytes(BLOCK_BYTES - 104 - 8 * len(words))


def test_the_golden_log_batch_has_every_operation_of_the_log() -> None:
    later = {Op.POLICY, Op.RELOCATE, Op.LOST, Op.REWRITE, Op.FILLING}  # which have images of their own
    assert {Op(first >> 56) for first, _, _ in LOG_OPS} == set(Op) - {Op.PAGE, Op.CATALOG} - later


@pytest.mark.parametrize("length", [0, 1, 7, 8, 72, 79])
def test_a_segment_header_cut_short_is_refused(length: int) -> None:
    with pytest.raises(BadRecordError):
        decode_segment_header(sample_segment_header()[:length], POOL)


@given(st.binary(max_size=2 * BLOCK_BYTES))
@example(bytes(BLOCK_BYTES))
def test_garbage_is_never_a_record(garbage: bytes) -> None:
    with pytest.raises(BadRecordError):
        decode_segment_header(garbage, POOL)
    with pytest.raises(BadRecordError):
        decode_batch(garbage, POOL, 1, 1)


@pytest.mark.parametrize("length", [0, 1, 8, 14, 100, 103, 104, 4095])
def test_a_batch_header_cut_short_is_refused(length: int) -> None:
    with pytest.raises(BadRecordError):
        decode_batch(sample_batch()[:length], POOL, 9, 4)
    peek_header_slots(sample_batch()[:length])
