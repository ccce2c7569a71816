"""Every input that was ever worth keeping does no harm, nor do a few seconds of new ones; and the fuzzer can find."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz import engine
from tests.fuzz.engine import Campaign, Finding, GrowthError, HangError, Target, bounded, endure, minimal, mutate
from tests.fuzz.targets import TARGETS


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is logged about garbage would fill the report of a failure."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_corpus_does_no_harm(name: str) -> None:
    target = TARGETS[name]
    saved = sorted(target.corpus.glob("*"))
    assert saved, f"no corpus: run python -m tests.fuzz {name} --minimize"
    for path in saved:
        try:
            with bounded():
                target.run(path.read_bytes())
        except (Exception, HangError) as error:
            error.add_note(f"the input is {path}")
            raise


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_few_seconds_of_new_inputs_do_no_harm(name: str) -> None:
    target = TARGETS[name]
    inputs = target.inputs()

    @settings(max_examples=target.examples, suppress_health_check=list(HealthCheck), database=None)
    @example(0, 0, b"")
    @given(st.integers(0, len(inputs) - 1), st.integers(0, 1 << 32), st.binary(max_size=200))
    def explore(start: int, seed: int, other: bytes) -> None:
        with bounded():
            target.run(mutate(random.Random(seed), inputs[start], [*target.words, other], inputs))

    explore()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_corpus_is_small(name: str) -> None:
    assert sum(path.stat().st_size for path in TARGETS[name].corpus.glob("*")) <= 64 << 10


# -- the fuzzer itself -------------------------------------------------------------------------------------------------


def _maze(data: bytes) -> None:
    """Four doors, which nobody passes by chance: it takes one step after the other."""
    from tiers.record import BATCH_MAGIC

    for at, letter in enumerate(b"maze"):
        if data[at : at + 1] != bytes([letter]):
            engine_edge(at)
            return
    engine_edge(4)
    assert data[4:12] != BATCH_MAGIC


def engine_edge(depth: int) -> None:
    """Stands for code of ours that is reached at each depth."""
    from tiers.names import validate_name, validate_volume_size
    from tiers.record import header_slots_for, peek_header_slots

    if depth >= 1:
        header_slots_for(1, 1)
    if depth >= 2:
        peek_header_slots(b"")
    if depth >= 3:
        validate_volume_size(4096)
    if depth >= 4:
        validate_name("volume", "v")


def test_the_fuzzer_follows_coverage_step_by_step_to_a_failure() -> None:
    words = [bytes([letter]) for letter in b"maze"] + [b"TRCBATC1"]
    campaign = Campaign(Target("maze", _maze, lambda: [b""], words), seed=3)
    with pytest.raises(Finding) as caught:
        campaign.fuzz(1.0)
    assert caught.value.data.startswith(b"mazeTRCBATC1")
    assert isinstance(caught.value.__cause__, AssertionError)


def test_the_same_seed_mutates_the_same() -> None:
    def inputs(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutate(rng, b"some bytes to begin with", [b"word"], [b"other"]) for _ in range(50)]

    assert inputs(1) == inputs(1) != inputs(2)


def test_a_hang_and_a_memory_bomb_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TIME_LIMIT_S", 0.05)
    with pytest.raises(HangError), bounded():
        time.sleep(5)
    monkeypatch.setattr(engine, "TIME_LIMIT_S", 60.0)
    with pytest.raises(MemoryError), bounded():
        bytearray(2 << 30)


def test_a_run_of_many_inputs_notices_growth_and_names_the_input_that_breaks() -> None:
    kept: list[bytes] = []

    def leaky(data: bytes) -> None:
        kept.append(b"x" * (32 << 10))

    def fragile(inputs: Iterable[bytes]) -> None:
        for data in inputs:
            assert data[:1] != b"\x80"

    leak = Target("leaky", leaky, lambda: [b"x"])
    with pytest.raises(GrowthError, match="memory grows: 1500 inputs"):
        endure([leak], 1, 1500)
    kept.clear()
    sound = Target("sound", lambda data: None, lambda: [b"x"])
    endured = endure([sound, sound], 1, 3000)
    assert endured.inputs == 3000 and "a second" in str(endured)
    with pytest.raises(Finding) as caught:
        endure([sound, Target("fragile", sound.run, lambda: [bytes(8)], run_many=fragile)], 1, 1_000_000)
    assert caught.value.data[:1] == b"\x80"


def test_the_minimal_corpus_reaches_as_much_with_less() -> None:
    target = Target("maze", _maze, lambda: [])
    inputs = [b"", b"m", b"maX" + bytes(500), b"ma", b"mazX", b"maz", bytes(100)]
    kept = minimal(target, inputs)
    assert sorted(kept) == [b"m", b"ma", b"maz"]
