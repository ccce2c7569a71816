"""Damage: what a leg's own node has found that it can't read, until the mirror's primary has healed it.

The node that has a leg finds damage before anybody reads there: its scrub does, and a device that is lost takes blocks
with it. It must not mend that by itself where nothing proves what was written there: only the primary knows the order
of the writes. So it tells the primary, a bounded batch at a time, which reads a good leg and writes this one anew
(`replication.healing`), and answers what became of it. Whoever is primary is asked, this node itself too.

What wasn't healed stays noted, by extents, and is told again: after growing pauses while nobody can heal it, as there
is no primary, it can't be reached, or this leg isn't in sync; and an hour later where no leg has it, or the map of
this one is damaged, but at once where another node has become primary, which couldn't tell operators of it else. All is
in memory: after a restart the next scrub finds it again, and the list of lost blocks is the pool's.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import trio

from replication.healing import Healing
from replication.leg import BLOCK_BYTES, Extents

BATCH_RANGES: Final = 64
RANGE_BYTES: Final = 1 << 20
WORK_S: Final = 5.0
"""For so long a primary works on one batch; what is left of it comes again."""
RETRY_S: Final = 0.5
RETRY_MAX_S: Final = 30.0
HOPELESS_RETRY_S: Final = 3600.0

Done = tuple[int, int, int, int]
"""(offset, length, blocks that were written anew, blocks that can't be: no leg has them, or a damaged map)."""
Ranges = Sequence[tuple[int, int]]
Ask = Callable[[Ranges], Awaitable[list[Done]]]
"""Have a batch healed by the primary. Raises OSError if that can't be now."""


class Damage:
    """See the module: of one leg. `run` has to be run."""

    def __init__(
        self, empty: Callable[[], Extents], ask: Ask, healed: Callable[[int, int, int], Awaitable[None]]
    ) -> None:
        """`empty` makes a set. `healed` is told (offset, length, blocks) of what can be read again now."""
        self._noted = empty()
        self._hopeless = empty()
        self._meanwhile = empty()
        """Noted while a batch is being healed: it may have been looked at before."""
        self._ask = ask
        self._healed = healed
        self._wake = trio.Event()
        self._pausing = trio.CancelScope()
        self.problem: OSError | None = None
        """Why it isn't being healed."""

    def note(self, offset: int, length: int) -> None:
        """That can't be read here. Never waits."""
        self._noted.add(offset, length)
        self._meanwhile.add(offset, length)
        self._wake.set()

    def again(self) -> None:
        """All of it is to be told now, also what couldn't be healed: there is another primary, who doesn't know it."""
        self._noted.update(self._hopeless)
        self._meanwhile.update(self._hopeless)
        self._hopeless.clear()
        self._wake.set()
        self._pausing.cancel()

    @property
    def extents(self) -> int:
        """How many extents have damage that may still be healed."""
        return self._noted.count

    @property
    def hopeless(self) -> int:
        """How many extents have blocks that can't be healed: no leg has them, or the map here is damaged."""
        return self._hopeless.count

    async def run(self) -> None:
        """The task."""
        pause_s = RETRY_S
        retry_at = trio.current_time() + HOPELESS_RETRY_S
        while True:
            if trio.current_time() >= retry_at:
                self._noted.update(self._hopeless)
                self._hopeless.clear()
                retry_at = trio.current_time() + HOPELESS_RETRY_S
            batch = self._batch()
            if not batch:
                self.problem = None
                with trio.move_on_at(retry_at):
                    await self._wake.wait()
                self._wake = trio.Event()
                continue
            self._meanwhile.clear()
            try:
                done = await self._ask(batch)
            except OSError as error:
                self.problem = error
                with trio.CancelScope() as self._pausing:
                    await trio.sleep(pause_s)
                pause_s = RETRY_S if self._pausing.cancelled_caught else min(pause_s * 2, RETRY_MAX_S)
                continue
            self.problem = None
            pause_s = RETRY_S
            for offset, length, blocks, left in done:
                self._noted.discard(offset, length)
                if left:
                    self._hopeless.add(offset, length)
                else:
                    self._hopeless.discard(offset, length)
                    await self._healed(offset, length, blocks)
            self._noted.update(self._meanwhile)
            if not done:
                await trio.sleep(RETRY_S)

    def _batch(self) -> list[tuple[int, int]]:
        batch: list[tuple[int, int]] = []
        for start, length in self._noted.runs():
            for at in range(start, start + length, RANGE_BYTES):
                batch.append((at, min(RANGE_BYTES, start + length - at)))
                if len(batch) >= BATCH_RANGES:
                    return batch
        return batch


async def heal_told(healing: Healing, leg_id: str, ranges: Ranges, work_s: float = WORK_S) -> list[Done]:
    """The primary's answer to what a leg's node has told; at least one range, then as many as there is time for.

    Raises OSError EAGAIN for a leg that isn't in sync.
    """
    until = trio.current_time() + work_s
    done: list[Done] = []
    for offset, length in ranges:
        if done and trio.current_time() >= until:
            break
        outcome = await healing.mend(leg_id, offset, length)
        done.append((offset, length, outcome.healed_blocks, sum(size for _, size in outcome.left) // BLOCK_BYTES))
    if done:
        healing.tell(leg_id, done[0][0], sum(blocks for _, _, blocks, _ in done))
    return done


def judge_ranges(body: Any, size_bytes: int, *, most: int = BATCH_RANGES) -> list[tuple[int, int]]:
    """What another node has sent as ranges. Raises OSError EPROTO.

    One behind the end is none: its leg may have damage where the mirror was shrunk, and nothing is to be healed there.
    """
    if not isinstance(body, list) or len(body) > most:
        raise OSError(errno.EPROTO, f"ranges are no list of at most {most}")
    ranges: list[tuple[int, int]] = []
    for item in body:
        match item:
            case [int(offset), int(length)] if (
                type(offset) is type(length) is int and offset >= 0 and 0 < length <= RANGE_BYTES
            ):
                ranges.append((offset, max(0, min(length, size_bytes - offset))))
            case _:
                raise OSError(errno.EPROTO, f"{str(item)[:40]} is no range of {size_bytes} bytes")
    return ranges


def judge_done(body: Any, asked: Ranges) -> list[Done]:
    """What a primary has answered. Raises OSError EPROTO."""
    if not isinstance(body, list):
        raise OSError(errno.EPROTO, "a primary's answer to damage is no list")
    lengths = dict(asked)
    done: list[Done] = []
    for item in body:
        match item:
            case [int(offset), int(), int(healed), int(left)] if healed >= 0 and left >= 0 and offset in lengths:
                done.append((offset, lengths[offset], healed, left))
            case _:
                raise OSError(errno.EPROTO, f"a primary's answer to damage has {str(item)[:60]}")
    return done
