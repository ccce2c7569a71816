"""kill -9 under load, over and over, and not one acknowledged byte lost.

The pool is barely larger than its volumes, so each round also meets the cleaner and the checkpoint at some point of
their work. A failure prints the seed; `CRASH_SEED=N` repeats its choices (the daemon's timing stays its own) and
`CRASH_ROUNDS=N` runs more of them.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests.system.daemon import Daemon
from tests.system.verifier import UNIT, Image, Request, Violation, Worker, payload, verify

SEED = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(1 << 32))
ROUNDS = int(os.environ.get("CRASH_ROUNDS") or 50)
MIB = 1 << 20
VOLUMES = {"crash/large": 192 * MIB, "crash/small": 64 * MIB}
RAW_BYTES = int(sum(VOLUMES.values()) / 0.85)
CHECK_EVERY = 10


@pytest.mark.system
def test_no_acknowledged_byte_is_lost_by_sigkill_under_load(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    daemon = Daemon(tmp_path / "home")
    daemon.start()
    fast_bytes = RAW_BYTES // 4 // MIB * MIB
    devices = ["--fast", f"{tmp_path}/fast={fast_bytes}", "--base", f"{tmp_path}/base={RAW_BYTES - fast_bytes}"]
    daemon.cli("pool", "create", "crash", *devices)
    for name, size_bytes in VOLUMES.items():
        daemon.cli("volume", "create", name, str(size_bytes))
    data = payload(rng)
    images = [Image(name, size_bytes, data) for name, size_bytes in VOLUMES.items()]
    try:
        for number in range(1, ROUNDS + 1):
            story = one_round(daemon, images, rng)
            if number % CHECK_EVERY == 0:
                daemon.cli("pool", "check", "crash", "--full")
            print(f"round {number}: {story}")
    except Exception as error:
        error.add_note(f"round {number} of CRASH_SEED={SEED}; daemon's log:\n{daemon.tail()}")
        raise
    finally:
        daemon.kill()
    written = sum(image.acknowledged for image in images)
    assert written > 100 * ROUNDS, f"only {written} requests acknowledged in {ROUNDS} rounds: this tested nothing"


def one_round(daemon: Daemon, images: list[Image], rng: random.Random) -> str:
    """Load, kill, perhaps kill again while it recovers, and check every byte. Leaves the daemon running."""
    before = sum(image.acknowledged for image in images)
    workers = [
        Worker(image, address, rng.choice([1, 4, 16]), random.Random(rng.random()))
        for image in images
        for address in (daemon.socket, daemon.socket, ("127.0.0.1", daemon.port))
    ]
    for worker in workers:
        worker.start()
    load_s = rng.uniform(0.020, 0.300)
    time.sleep(load_s)
    for worker in workers:
        if worker.failure is not None:
            worker.failure.add_note(f"the pool then: {daemon.pool('crash')}")
    daemon.kill()
    for worker in workers:
        worker.join()
    in_flight = sum(len(image.in_flight) for image in images)
    acknowledged = sum(image.acknowledged for image in images) - before

    daemon.config = f"[pool]\ncheckpoint_interval_s = {rng.choice([0.05, 0.5, 30])}\n"
    again = rng.random() < 0.15
    if again:
        daemon.spawn()
        time.sleep(rng.uniform(0.2, 1.0))
        daemon.kill()
    ready_s = daemon.start()
    for image in images:
        verify(daemon.socket, image)
    twice = ", killed again during recovery" if again else ""
    return (
        f"{acknowledged} acknowledged and {in_flight} in flight after {load_s * 1e3:.0f} ms{twice}; "
        f"ready again in {ready_s:.2f} s"
    )


def test_the_oracle_accepts_exactly_old_or_new_under_a_request_in_flight() -> None:
    image = Image("x", 8 * UNIT, payload(random.Random(0)))
    old, new = np.full(8 * UNIT, 1, np.uint8), np.full(2 * UNIT, 2, np.uint8)
    unaligned = Request(1, 1, UNIT + 100, 2 * UNIT, data=new)  # touches units 1, 2 and 3

    def judge(found: np.ndarray) -> None:
        image.expected = old.copy()
        image.in_flight = {unaligned}
        image.judge(0, found)
        assert np.array_equal(image.expected, found)

    after = old.copy()
    after[UNIT + 100 : 3 * UNIT + 100] = 2
    judge(old)
    judge(after)
    mixed = old.copy()
    mixed[2 * UNIT : 3 * UNIT] = 2  # one of the three units new
    judge(mixed)

    torn = old.copy()
    torn[2 * UNIT : 2 * UNIT + 50] = 2
    for wrong in (torn, after * 3, np.concatenate([old[:-1], np.zeros(1, np.uint8)])):
        with pytest.raises(Violation):
            judge(wrong)


def test_the_oracle_names_the_write_that_came_back_from_the_past() -> None:
    image = Image("x", 64 << 10, payload(random.Random(0)))
    first = Request(1, 1, 0, 4096, data=np.full(4096, 1, np.uint8), acknowledged=True)
    second = Request(2, 1, 0, 4096, data=np.full(4096, 2, np.uint8), acknowledged=True)
    image._history.extend([first, second])
    image.expected[:4096] = 2
    found = image.expected.copy()
    found[:4096] = 1
    with pytest.raises(
        Violation,
        match=r"8 units of 512 bytes wrong from 0 to 65536, first.*found what #1 write 0\+4096 acknowledged wrote",
    ):
        image.judge(0, found)
