"""kill -9 under load, over and over, and not one acknowledged byte lost.

Six connections to two volumes write, trim, zero, read and flush, with and without FUA, while volumes come, grow and
go. The fast tier is about as large as the volumes, so rounds also meet the cleaner and the checkpoint at some point of
their work; that they were at work is asserted in the end. A failure prints the seed; `CRASH_SEED=N` repeats its choices
(the daemon's timing stays its own) and `CRASH_ROUNDS=N` runs more of them.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.system import nbdclient
from tests.system.daemon import Daemon
from tests.system.verifier import KINDS, UNIT, Image, Request, Violation, Worker, fill, payload, verify

SEED = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(1 << 32))
ROUNDS = int(os.environ.get("CRASH_ROUNDS") or 50)
MIB = 1 << 20
VOLUMES = {"crash/large": 24 * MIB, "crash/small": 8 * MIB}
FAST_BYTES, BASE_BYTES = 32 * MIB, 96 * MIB  # a fast tier as small as may be, so that the cleaner has to empty it
CHECK_EVERY = 10


@pytest.mark.system
@pytest.mark.long
def test_no_acknowledged_byte_is_lost_by_sigkill_under_load(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    daemon = Daemon(tmp_path / "home")
    daemon.start()
    devices = ["--fast", f"{tmp_path}/fast={FAST_BYTES}", "--base", f"{tmp_path}/base={BASE_BYTES}"]
    daemon.cli("pool", "create", "crash", *devices)
    for name, size_bytes in VOLUMES.items():
        daemon.cli("volume", "create", name, str(size_bytes))
    data = payload(rng)
    images = [Image(name, size_bytes, data) for name, size_bytes in VOLUMES.items()]
    seen = Seen()
    try:
        for image in images:
            fill(daemon.socket, image)
        for number in range(1, ROUNDS + 1):
            story = one_round(daemon, images, rng, seen)
            if number % CHECK_EVERY == 0:
                daemon.cli("pool", "check", "crash", "--full")
            print(f"round {number}: {story}")
    except Exception as error:
        error.add_note(f"round {number} of CRASH_SEED={SEED}; daemon's log:\n{daemon.tail()}")
        raise
    finally:
        daemon.kill()
    print(seen)
    # Each kind of request was acknowledged, and kills met checkpoints, the cleaner, the log, volumes coming and going.
    rare = min(KINDS, key=lambda kind: sum(image.by_kind[kind] for image in images))
    assert sum(image.by_kind[rare] for image in images) >= ROUNDS // 10, f"hardly any {rare}: this tested too little"
    assert min(seen.checkpoints, seen.moved_blocks, seen.replayed_batches, seen.volumes) >= ROUNDS // 4, seen
    written = sum(image.acknowledged for image in images)
    assert written > 100 * ROUNDS, f"only {written} requests acknowledged in {ROUNDS} rounds: this tested nothing"


@dataclass
class Seen:
    """What was going on in the pool while it was killed, over all rounds."""

    checkpoints: int = 0
    moved_blocks: int = 0
    replayed_batches: int = 0
    volumes: int = 0
    """Volumes that were created while the load ran."""


@dataclass
class Administrator:
    """Creates, grows and deletes one volume after the other until the daemon dies, and knows what was answered."""

    daemon: Daemon
    seen: Seen
    number: int
    sizes: set[int | None] = field(default_factory=lambda: {None})
    """What the volume at hand may have now: a size, or None for no volume. Two while a request is under way."""
    failure: BaseException | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return f"passing-{self.number}"

    def _ask(self, method: str, path: str, body: object, size: int | None) -> None:
        self.sizes.add(size)
        content = json.dumps(body).encode() if body is not None else b""
        with nbdclient.connect(self.daemon.home / "api.sock") as raw:
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: terrace\r\nConnection: close\r\nContent-Type: application/json\r\n"
            )
            raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        if not answer:
            raise ConnectionResetError("no answer")
        if not answer.startswith(b"HTTP/1.1 20"):
            raise Violation(f"{method} {path} {body}: {answer[-500:].decode()}")
        self.sizes = {size}

    def _run(self) -> None:
        volumes = "/v1/pools/crash/volumes"
        try:
            while True:
                self._ask("POST", volumes, {"name": self.name, "size": MIB}, MIB)
                self.seen.volumes += 1
                self._ask("PATCH", f"{volumes}/{self.name}", {"size": 3 * MIB}, 3 * MIB)
                self._ask("DELETE", f"{volumes}/{self.name}", None, None)
                self.number += 1
        except (ConnectionError, FileNotFoundError):
            pass  # the daemon was killed
        except BaseException as error:
            self.failure = error

    def judge(self) -> None:
        """After the crash: what was answered holds, what was under way happened or not."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure
        found = {v["name"]: v["size_bytes"] for v in self.daemon.pool("crash")["volumes"]}
        passing = {name: size for name, size in found.items() if name not in VOLUMES}
        assert set(passing) <= {f"crash/{self.name}"} and passing.get(f"crash/{self.name}") in self.sizes, (
            f"volumes {passing} are there; {self.name} may have {self.sizes}"
        )
        if passing:
            self.daemon.api("DELETE", f"/v1/pools/crash/volumes/{self.name}")


def one_round(daemon: Daemon, images: list[Image], rng: random.Random, seen: Seen) -> str:
    """Load, kill, perhaps kill again while it recovers, and check every byte. Leaves the daemon running."""
    before = sum(image.acknowledged for image in images)
    workers = [
        Worker(image, address, rng.choice([1, 4, 16]), random.Random(rng.random()))
        for image in images
        for address in (daemon.socket, daemon.socket, ("127.0.0.1", daemon.port))
    ]
    for worker in workers:
        worker.start()
    administrator = Administrator(daemon, seen, before)
    administrator.start()
    load_s = rng.uniform(0.020, 0.300)
    time.sleep(load_s)
    if rng.random() < 0.5:
        status = daemon.pool("crash")
        seen.checkpoints += status["checkpoints"]
        seen.moved_blocks += status["blocks_moved"]
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
    seen.replayed_batches += daemon.pool("crash")["replayed_batches"]
    administrator.judge()
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


def test_the_oracle_judges_each_of_two_requests_in_flight_that_meet_in_a_unit() -> None:
    image = Image("x", 4 * UNIT, payload(random.Random(0)))
    ends, begins = UNIT + 100, UNIT + 200  # in unit 1, whose bytes between them are nobody's
    one = Request(1, 1, 0, ends, data=np.full(ends, 2, np.uint8))
    other = Request(2, 1, begins, UNIT, data=np.full(UNIT, 3, np.uint8))

    def judge(found: np.ndarray) -> None:
        image.expected = np.full(4 * UNIT, 1, np.uint8)
        image.in_flight = {one, other}
        image.judge(0, found)
        assert np.array_equal(image.expected, found)

    for one_is_there in (False, True):
        for other_is_there in (False, True):
            found = np.full(4 * UNIT, 1, np.uint8)
            found[UNIT:ends] = 2 if one_is_there else 1
            found[begins : 2 * UNIT] = 3 if other_is_there else 1
            judge(found)
            for at in (ends - 1, ends, begins - 1, begins):
                wrong = found.copy()
                wrong[at] = 9
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
