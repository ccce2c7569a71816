"""A small coverage-guided fuzzer: inputs that reach new lines are kept and mutated further.

A target is a function of bytes that returns if all is well, and raises anything else. Coverage is the set of pairs of
lines that ran one after the other in `nbd/`, `tiers/` and `terrace/backup/`, by `sys.settrace`. That is slow beside a
compiled fuzzer, but needs nothing installed, runs wherever the project runs, and in the test process. Everything random
comes from a seed.

Each run is bounded in time (an alarm) and in memory (the address space), so a hang or a bomb is a finding too.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import hashlib
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus")
TRACED = (f"{REPOSITORY}/nbd/", f"{REPOSITORY}/tiers/", f"{REPOSITORY}/terrace/backup/")
MAX_INPUT_BYTES = 16 << 10
TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 1 << 30
GROWTH_LIMIT_BYTES = 8 << 20
ENDURED_BATCH = 500

Edges = set[int]
INTERESTING = tuple(
    sorted(
        {
            (1 << bits) + step
            for bits in (0, 7, 8, 12, 15, 16, 20, 24, 31, 32, 38, 40, 48, 56, 62, 63, 64)
            for step in (-1, 0, 1)
        }
    )
)


class HangError(BaseException):
    """A run took longer than TIME_LIMIT_S. No `Exception`, so that no handler on the way takes it for an error."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed: `run` judges one input, `seeds` are valid ones, `words` are bytes worth inserting."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[bytes] = ()
    run_many: Callable[[Iterable[bytes]], None] | None = None
    """As `run` for each, in one process that lasts, as a server does: faster, and what it leaves behind adds up."""
    examples: int = 100
    """How many examples the test in CI tries."""

    @property
    def corpus(self) -> Path:
        return CORPUS / self.name

    def inputs(self) -> list[bytes]:
        """The saved corpus and the seeds, the same for everybody."""
        saved = [path.read_bytes() for path in sorted(self.corpus.glob("*"))]
        return [*saved, *(seed for seed in self.seeds() if seed not in saved)]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit the time and the additional memory of what runs inside. Main thread only."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise HangError(f"still running after {TIME_LIMIT_S:g} s")

    page = resource.getpagesize()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * page
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + MEMORY_LIMIT_BYTES
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def covered(run: Callable[[bytes], None], data: bytes) -> Edges:
    """Run one input; return the edges that it took."""
    edges: Edges = set()
    files: dict[str, bool] = {}

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        traced = files.get(name)
        if traced is None:
            traced = files[name] = name.startswith(TRACED)
        if not traced:
            frame.f_trace_lines = False
            return None
        base = (hash(name) & 0xFFFFFFFF) << 32
        last = frame.f_code.co_firstlineno

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                line = frame.f_lineno
                edges.add(base | last << 16 | line)
                last = line
            return on_line

        return on_line

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        run(data)
    finally:
        sys.settrace(before)
    return edges


# -- mutation ----------------------------------------------------------------------------------------------------------


def _change_byte(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _set_number(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    size = rng.choice((2, 4, 8))
    if len(data) >= size:
        at = rng.randrange(len(data) - size + 1)
        if rng.random() < 0.6:
            at -= at % size
        order: Literal["little", "big"] = rng.choice(("little", "big"))
        value = rng.choice(INTERESTING)
        if rng.random() < 0.3:
            value = int.from_bytes(data[at : at + size], order) + rng.randrange(-16, 17)
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, order)


def _insert(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(words) if words and rng.random() < 0.7 else rng.randbytes(rng.randrange(1, 32))


def _put_word(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    if words:
        word = rng.choice(words)
        at = rng.randrange(len(data) + 1)
        data[at : at + len(word)] = word


def _delete(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    if data:
        at = rng.randrange(len(data))
        del data[at : at + rng.choice((1, 2, 4, 8, 28, rng.randrange(1, len(data) + 1)))]


def _double(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    if data:
        start = rng.randrange(len(data))
        part = data[start : start + rng.choice((4, 8, 16, 28, 64))]
        at = rng.randrange(len(data) + 1)
        data[at:at] = part


def _splice(rng: random.Random, data: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    if others:
        other = rng.choice(others)
        data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]


_MUTATIONS = (_change_byte, _set_byte, _set_number, _set_number, _insert, _put_word, _delete, _double, _splice)


def mutate(rng: random.Random, data: bytes, words: Sequence[bytes] = (), others: Sequence[bytes] = ()) -> bytes:
    """A few random changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_MUTATIONS)(rng, changed, words, others)
    return bytes(changed[:MAX_INPUT_BYTES])


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass
class Finding(Exception):
    """An input that breaks a target; `__cause__` says how."""

    data: bytes

    def __str__(self) -> str:
        return f"an input of {len(self.data)} bytes: {self.data!r:.400}"


@dataclass
class Campaign:
    """One fuzzing run: the inputs that matter so far, and what they reach."""

    target: Target
    seed: int
    blind: bool = False
    """Don't trace: several times as many runs, and nothing learnt from them."""
    edges: Edges = field(default_factory=set)
    kept: list[bytes] = field(default_factory=list)
    new: list[bytes] = field(default_factory=list)
    runs: int = 0

    def attempt(self, data: bytes) -> bool:
        """Run one input; keep it if it reached something new. Raises Finding."""
        self.runs += 1
        # An alarm doesn't reach code in C that doesn't return: then at least say where, and end.
        faulthandler.dump_traceback_later(3 * TIME_LIMIT_S, exit=True)
        try:
            with bounded():
                edges = covered(self.target.run, data) if not self.blind else self._run_blindly(data)
        except (Exception, HangError) as error:
            raise Finding(data) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if edges <= self.edges:
            return False
        self.edges |= edges
        self.kept.append(data)
        return True

    def _run_blindly(self, data: bytes) -> Edges:
        self.target.run(data)
        return set()

    def fuzz(self, minutes: float) -> None:
        """Mutate what is kept until the time is up."""
        rng = random.Random(self.seed)
        until = time.monotonic() + 60 * minutes
        for data in self.target.inputs() if not self.blind else ():
            self.attempt(data)
        self.kept = (self.target.inputs() if self.blind else self.kept) or [b""]
        while time.monotonic() < until:
            # The newest half is chosen more often: there is more to find near it.
            half = len(self.kept) // 2 if rng.random() < 0.5 else 0
            data = mutate(rng, rng.choice(self.kept[half:]), self.target.words, self.kept)
            if self.attempt(data):
                self.new.append(data)


# -- endurance ---------------------------------------------------------------------------------------------------------


class GrowthError(AssertionError):
    """The process has become larger."""


@dataclass(frozen=True)
class Endured:
    """What a run of many inputs took. Bytes of resident memory after a tenth of them, and at the end."""

    inputs: int
    seconds: float
    early_bytes: int
    late_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.inputs} inputs in {self.seconds:.0f} s, {self.inputs / self.seconds:.0f} a second; "
            f"{self.early_bytes >> 10} KiB of memory after a tenth of them, {self.late_bytes >> 10} KiB at the end"
        )


def resident_bytes() -> int:
    """What this process holds of the machine's memory now, without what it has freed but not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def endure(targets: Sequence[Target], seed: int, count: int) -> Endured:
    """Run `count` mutated inputs, of the targets in turn, without looking at coverage.

    Raises Finding where one breaks its target, GrowthError where memory grows by more than `GROWTH_LIMIT_BYTES` from
    the first tenth of them to the last: for a million that is nine bytes each.
    """
    rng = random.Random(seed)
    known = {target.name: target.inputs() for target in targets}
    begun = time.monotonic()
    done = early = 0
    gc.collect()
    frozen_before = gc.get_freeze_count()
    gc.freeze()  # so that looking for garbage after each batch costs little
    try:
        with bounded():
            while done < count:
                for target in targets:
                    share = min(ENDURED_BATCH, count - done)
                    _run_batch(target, rng, known[target.name], share)
                    done += share
                    gc.collect()
                    if not early and done * 10 >= count:
                        early = resident_bytes()
    finally:
        if not frozen_before:  # else who froze that wants it so: see tests/conftest.py
            gc.unfreeze()
    endured = Endured(done, time.monotonic() - begun, early, resident_bytes())
    if endured.late_bytes - endured.early_bytes > GROWTH_LIMIT_BYTES:
        raise GrowthError(f"memory grows: {endured}")
    return endured


def _run_batch(target: Target, rng: random.Random, known: Sequence[bytes], count: int) -> None:
    last = b""

    def mutated() -> Iterator[bytes]:
        nonlocal last
        for _ in range(count):
            last = mutate(rng, rng.choice(known), target.words, known)
            signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
            yield last

    # An alarm doesn't reach code in C that doesn't return: then at least say where, and end.
    faulthandler.dump_traceback_later(3 * TIME_LIMIT_S, exit=True)
    try:
        if target.run_many is not None:
            target.run_many(mutated())
        else:
            for data in mutated():
                target.run(data)
    except (Exception, HangError) as error:
        raise Finding(last) from error
    finally:
        faulthandler.cancel_dump_traceback_later()


def minimal(target: Target, inputs: Sequence[bytes]) -> list[bytes]:
    """The shortest inputs that together reach what all of them reach, each cut down as long as that holds."""
    kept: list[bytes] = []
    edges: Edges = set()
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        found = covered(target.run, data)
        if found <= edges:
            continue
        for size in (1024, 128, 16):
            at = 0
            while at < len(data):
                shorter = data[:at] + data[at + size :]
                if found - edges <= covered(target.run, shorter):
                    data = shorter
                else:
                    at += size
        edges |= found
        kept.append(data)
    return kept


def save(target: Target, inputs: Sequence[bytes]) -> None:
    """Add inputs to the corpus in the repository; the name is the content's."""
    target.corpus.mkdir(parents=True, exist_ok=True)
    for data in inputs:
        (target.corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
