"""Frames: what is packed comes back, addresses are told apart, and damaged bytes give errors and nothing worse."""

import random
import threading
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tiers.frames import (
    FIRST_SLOT_LIMIT,
    MAX_FRAME_BLOCKS,
    MAX_FRAME_BYTES,
    BadFrameError,
    FrameCache,
    block_at,
    frame_of,
    index_of,
    pack,
    pack_all,
    place_in_frame,
    slots_of,
    unpack,
    unpack_all,
)
from tiers.layout import BLOCK_BYTES, MAX_SEGMENT_BYTES, SLOT_BITS, check_of

GOLDEN = Path(__file__).parent / "golden"


def block(seed: int, entropy: float) -> bytes:
    """A block of which a share is random, the rest repeats."""
    rng = random.Random(seed)
    noise = rng.randbytes(int(BLOCK_BYTES * entropy))
    return noise + (b"%08d" % seed * BLOCK_BYTES)[: BLOCK_BYTES - len(noise)]


BLOCKS = st.lists(st.builds(block, st.integers(0, 1 << 30), st.floats(0, 1)), min_size=1, max_size=MAX_FRAME_BLOCKS)


# -- addresses ---------------------------------------------------------------------------------------------------------


@given(st.data())
def test_an_address_says_where_its_frame_lies_and_which_block_it_is(data: st.DataObject) -> None:
    segment = data.draw(st.integers(1, (1 << 40) - 1))
    slots = data.draw(st.integers(1, MAX_FRAME_BLOCKS))
    first = data.draw(st.integers(1, FIRST_SLOT_LIMIT - slots))
    index = data.draw(st.integers(0, MAX_FRAME_BLOCKS - 1))
    address = segment << SLOT_BITS | place_in_frame(first, slots, index)
    assert address < 1 << 64 and address >> SLOT_BITS == segment
    assert slots_of(address) == (first, slots)
    assert index_of(address) == index
    assert frame_of(address) == segment << SLOT_BITS | place_in_frame(first, slots, 0) == address - index


def test_addresses_reach_every_slot_of_the_largest_segment() -> None:
    assert FIRST_SLOT_LIMIT * BLOCK_BYTES == MAX_SEGMENT_BYTES
    assert place_in_frame(FIRST_SLOT_LIMIT - 1, 1, 31) < 1 << SLOT_BITS


def test_the_address_of_the_format_is_this_number() -> None:
    assert place_in_frame(0x123, 5, 17) == 0x123 << 10 | 4 << 5 | 17


# -- packing -----------------------------------------------------------------------------------------------------------


@given(BLOCKS, st.sampled_from((1, 3, 9, 19)))
def test_what_is_packed_comes_back_and_saves_an_eighth(blocks: list[bytes], level: int) -> None:
    packed = pack(blocks, level)
    if packed is None:
        return
    assert packed.blocks == len(blocks)
    assert len(packed.data) == packed.slots * BLOCK_BYTES and packed.slots * 8 <= 7 * len(blocks)
    assert packed.check == check_of(packed.data)
    content = unpack(packed.data)
    assert content == b"".join(blocks)
    first = place_in_frame(9, packed.slots, 0)
    assert [block_at(content, first + i) for i in range(len(blocks))] == blocks
    assert all(len(block_at(content, first + i)) == 0 for i in range(len(blocks), MAX_FRAME_BLOCKS))


def test_what_can_hardly_be_compressed_is_not_packed() -> None:
    noise = [block(i, 1.0) for i in range(MAX_FRAME_BLOCKS)]
    assert pack(noise, 3) is None
    assert pack([block(1, 0.0)], 3) is None, "one block can't take less than a slot"
    assert pack([block(1, 0.0), block(2, 0.0)], 3) is not None
    most = [block(i, 0.0) if i < 3 else noise[i] for i in range(MAX_FRAME_BLOCKS)]
    assert pack(most, 3) is None
    most = [block(i, 0.0) if i < 6 else noise[i] for i in range(MAX_FRAME_BLOCKS)]
    packed = pack(most, 3)
    assert packed is not None and 26 < packed.slots <= 28


def test_several_frames_at_once() -> None:
    groups = [[block(1, 0.2)] * 4, [block(2, 1.0)], [block(3, 0.1)] * 32]
    one, none, three = pack_all(groups, 3)
    assert none is None and one is not None and three is not None
    assert unpack_all([one.data, b"garbage", three.data]) == [b"".join(groups[0]), b"", b"".join(groups[2])]


def test_threads_pack_and_unpack_at_the_same_time() -> None:
    failures: list[object] = []

    def work(seed: int) -> None:
        for i in range(40):
            blocks = [block(seed * 1000 + i * 40 + j, 0.3) for j in range(8)]
            packed = pack(blocks, 1 + seed % 3)
            if packed is None or unpack(packed.data) != b"".join(blocks):
                failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- damage ------------------------------------------------------------------------------------------------------------


def sample() -> bytes:
    packed = pack([block(i, 0.3) for i in range(8)], 3)
    assert packed is not None
    return packed.data


def test_every_flipped_bit_gives_an_error_or_some_blocks() -> None:
    data = bytearray(sample())
    for bit in random.Random(1).sample(range(len(data) * 8), 3000) + list(range(200)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            content = unpack(data)
        except BadFrameError:
            content = b""
        assert len(content) % BLOCK_BYTES == 0 and len(content) <= MAX_FRAME_BYTES
        data[bit // 8] ^= 1 << bit % 8
    assert len(unpack(data)) == 8 * BLOCK_BYTES


@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_no_frame(garbage: bytes, magic: bool) -> None:
    with pytest.raises(BadFrameError):
        unpack((b"\x28\xb5\x2f\xfd" if magic else b"\0") + garbage.ljust(BLOCK_BYTES, b"\0"))


@pytest.mark.parametrize("length", [0, 1, 4, 8, 12, 100])
def test_a_frame_cut_short_is_refused(length: int) -> None:
    with pytest.raises(BadFrameError):
        unpack(sample()[:length])
    with pytest.raises(BadFrameError):
        unpack(sample()[:length].ljust(BLOCK_BYTES, b"\0"))


@pytest.mark.parametrize(
    ("content", "says_size"),
    [
        (bytes(MAX_FRAME_BYTES + BLOCK_BYTES), True),
        (bytes(1 << 30), True),
        (bytes(BLOCK_BYTES - 1), True),
        (bytes(0), True),
        (bytes(BLOCK_BYTES), False),
    ],
    ids=["a block too much", "a gigabyte", "no whole block", "empty", "of unknown size"],
)
def test_a_sound_zstd_frame_that_no_release_writes_is_refused(content: bytes, says_size: bool) -> None:
    data = zstandard.ZstdCompressor(level=1, write_content_size=says_size).compress(content)
    with pytest.raises(BadFrameError):
        unpack(data.ljust(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES, b"\0"))


def test_a_frame_that_asks_for_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = stream.compress(bytes(BLOCK_BYTES)) + stream.flush()
    with pytest.raises(BadFrameError):
        unpack(data)


def test_the_frame_of_version_1_is_read() -> None:
    text = "".join(f"line {i} of a text that repeats itself, more or less; " for i in range(400)).encode()
    data = bytes.fromhex((GOLDEN / "v1-frame.hex").read_text()).ljust(BLOCK_BYTES, b"\0")
    assert unpack(data) == text[: 2 * BLOCK_BYTES]


# -- keeping -----------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_what_was_used_last_and_stays_in_its_bounds() -> None:
    cache = FrameCache(10 * BLOCK_BYTES)
    keys = [7 << SLOT_BITS | place_in_frame(10 * i + 1, 3, 0) for i in range(5)]
    for i, key in enumerate(keys[:3]):
        cache.put(key + i, bytes([i]) * 3 * BLOCK_BYTES)
    assert cache.bytes == 9 * BLOCK_BYTES
    assert cache.get(keys[0] + 31) == bytes(3 * BLOCK_BYTES)
    cache.put(keys[3], b"3" * 3 * BLOCK_BYTES)
    assert cache.get(keys[1]) is None and cache.get(keys[0]) is not None and cache.get(keys[2]) is not None
    cache.put(keys[0], b"n" * BLOCK_BYTES)
    assert cache.bytes == 7 * BLOCK_BYTES
    cache.drop(keys[0] + 5)
    cache.drop(keys[4])
    assert cache.get(keys[0]) is None and cache.bytes == 6 * BLOCK_BYTES
    cache.put(keys[4], bytes(11 * BLOCK_BYTES))
    assert cache.bytes == 0
    cache.put(keys[4], bytes(BLOCK_BYTES))
    cache.clear()
    assert cache.get(keys[4]) is None and cache.bytes == 0
