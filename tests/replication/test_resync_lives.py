"""Lives of a mirror whose legs come and go, and go bad, under clients: legs in sync are equal, and as acknowledged.

A block that was bad on the only leg in sync may be lost on all of them in the end, and then it is an error on each.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Iterator

import pytest
import trio

from replication.leg import BLOCK_BYTES, EXTENT_BYTES
from replication.resync import Resync, ResyncSettings
from replication.site import MirrorSettings
from tests.replication.rig import Rig, run
from tests.simulation.mutants import _instead

WRITERS, BLOCKS = 3, 90


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def life(seed: int) -> None:
    """Three clients write numbers while links break, the local disk fails, and blocks go bad and are healed."""
    rng = random.Random(seed)
    resync = ResyncSettings(workers=rng.choice([1, 3, 24]), flush_bytes=EXTENT_BYTES * rng.choice([1, 4]), idle_s=0.01)
    rig = Rig(3, settings=MirrorSettings(resync=resync, flush_every_s=rng.choice([0.05, 0.3, 5])))
    for node in "abc":
        rig.store(node).rng, rig.store(node).slow_s = rng, 0.004
    for node in "bc":
        rig.nodes[node].link.delay_s = 0.002
    over = trio.Event()
    may_be: dict[int, set[int]] = {}
    """By block: what was acknowledged last, and what has failed since."""

    async def write(client: int) -> None:
        for number in range(1, 101):
            block = rng.randrange(BLOCKS // WRITERS) * WRITERS + client
            may_be.setdefault(block, {0}).add(number)
            try:
                await rig.mirror.write(block * BLOCK_BYTES, bytes([number]) * BLOCK_BYTES)
                may_be[block] = {number}
                if rng.random() < 0.1:
                    await rig.mirror.flush()
            except OSError:
                await trio.sleep(0.01)

    async def fail() -> None:
        while not over.is_set():
            await trio.sleep(rng.random() * 0.2)
            node = rng.choice("abbcc")
            if node == "a":
                rig.store("a").failing = OSError(errno.EIO, "the disk is gone")
                await trio.sleep(rng.random() * 0.1)
                rig.store("a").failing = None
            else:
                rig.nodes[node].link.cut()
                await trio.sleep(rng.random() * 0.1)
                rig.nodes[node].link.mend()

    async def rot() -> None:
        while not over.is_set():
            await trio.sleep(rng.random() * 0.01)
            at = rng.randrange(BLOCKS) * BLOCK_BYTES
            if not any(at in rig.store(node).bad for node in "abc"):
                rig.store(rng.choice("abc")).bad.add(at)
            await rig.mirror.heal("leg" + rng.choice("abc"), at, EXTENT_BYTES)

    async def body() -> None:
        async with rig.running() as mirror:
            async with trio.open_nursery() as troubles:
                troubles.start_soon(fail)
                troubles.start_soon(rot)
                async with trio.open_nursery() as clients:
                    for client in range(WRITERS):
                        clients.start_soon(write, client)
                over.set()
            for node in "abc":
                rig.store(node).bad.clear()  # else the last leg in sync may keep the others out
            await rig.whole()
            for node in "abc":  # what was lost on one while it was bad on another, which may have it again
                await mirror.heal("leg" + node, 0, BLOCKS * BLOCK_BYTES)
            await mirror.flush()
            lost = rig.store("a").lost
            assert lost == rig.store("b").lost == rig.store("c").lost, f"seed {seed}: lost on some leg only"
            images = [bytes(rig.store(node).image) for node in "abc"]
            assert images[0] == images[1] == images[2], f"seed {seed}: legs in sync differ"
            for block, numbers in may_be.items():
                found = images[0][block * BLOCK_BYTES]
                is_lost = block * BLOCK_BYTES in lost  # the source couldn't read it when others came back
                assert is_lost or found in numbers, f"seed {seed}, block {block}: {found}, not {numbers}"

    run(body)


SEEDS = (*range(1006, 1010), 1094, 1107)
"""The last two catch the worker below."""


@pytest.mark.parametrize("seed", SEEDS)
def test_legs_that_come_and_go_are_equal_and_have_what_was_acknowledged(seed: int) -> None:
    life(seed)


def test_a_worker_that_leaves_what_was_touched_undone_is_caught() -> None:
    wrong = _instead(Resync, "_worker", "if not again:", "if True:")
    with wrong(), pytest.raises(BaseExceptionGroup) as caught:
        for seed in SEEDS[-2:]:
            life(seed)
    assert caught.value.subgroup(AssertionError) is not None
