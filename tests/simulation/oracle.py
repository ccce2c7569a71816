"""What a volume may hold after a crash.

The oracle is the promise: after a power cut a volume holds a prefix of its operations in the order in which they took
effect, with everything that had returned before the last completed flush began; after a kill it holds all that had
returned. The operation at which the prefix ends may be there in part, in whole blocks (it was not flushed, or had not
returned), and so may one that a device refused. A resize, another policy, or the mark of being filled,
is there or not. A block that a device
lost is an error to its readers, never other bytes.

So is a block that was given up (`Volume.lose`), until it is written or trimmed: that is an operation like any other. In
a model it holds `LOST`, bytes that nobody writes, and so it does in what is found where a block can't be read. What was
given up must be found so, and nothing else may be, unless the run has devices that fail.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tiers import Pool, TierError
from tiers.reader import Reader

BLOCK = 4096
Changes = list[tuple[int, bytes]]
LOST = random.Random("lost").randbytes(BLOCK)
"""What a block holds that is an error to its readers: the whole of it, or so much as the volume's end leaves of it."""


class OracleError(AssertionError):
    """The promise is broken."""


@dataclass(eq=False)
class Op:
    """One operation: bytes that it changes, a new size, or another policy, or the mark of being filled."""

    what: str
    changes: Changes = field(default_factory=list)
    size: int | None = None
    policy: str | None = None
    filling: bool | None = None
    attempted: Changes = field(default_factory=list)
    """What a refused operation would have changed. A crash may leave it there, where the prefix ends."""

    def apply(self, content: bytearray) -> None:
        if self.size is not None:
            if self.size < len(content):
                del content[self.size :]
            else:
                old = len(content)
                content.extend(bytes(self.size - old))
                last = old // BLOCK * BLOCK
                if last < old and content[last:old] == LOST[: old - last]:  # the rest of a lost block is lost as well
                    content[last : last + BLOCK] = LOST[: len(content) - last]
        for offset, data in self.changes:
            content[offset : offset + len(data)] = data

    def policy_after(self, policy: str) -> str:
        """The volume's policy once this has happened."""
        return policy if self.policy is None else self.policy

    def filling_after(self, filling: bool) -> bool:
        """Whether the volume is marked as being filled once this has happened."""
        return filling if self.filling is None else self.filling


class Model:
    """A volume as its user knows it: the content, and the operations that a crash may still take back."""

    def __init__(self, size: int, policy: str = "", filling: bool = False) -> None:
        self.content = bytearray(size)
        self.floor = bytearray(size)
        self.policy = self.floor_policy = policy
        self.filling = self.floor_filling = filling
        self.first = 0
        self.ops: list[Op] = []
        self.in_flight: Op | None = None
        self.in_doubt: Op | None = None
        """Refused, and its record is where nothing could be put over it: a crash may still let it come true."""

    @classmethod
    def holding(cls, content: bytes | bytearray, policy: str = "") -> Model:
        """A volume that holds this already, durably."""
        model = cls(0, policy)
        model.adopt(content, policy)
        return model

    @property
    def mark(self) -> int:
        """How many operations have returned, ever."""
        return self.first + len(self.ops)

    def returned(self, op: Op) -> None:
        """An operation was acknowledged. So the log goes on elsewhere, and a refused record is behind its end."""
        self.in_doubt = None
        op.apply(self.content)
        self.policy = op.policy_after(self.policy)
        self.filling = op.filling_after(self.filling)
        self.ops.append(op)

    def refused(self, op: Op, *, log_is_broken: bool) -> None:
        """An operation has changed nothing."""
        if log_is_broken and self.in_doubt is None:  # behind the first the log takes nothing
            self.in_doubt = op

    def flushed(self, mark: int) -> None:
        """A flush that began at `mark` has returned."""
        while self.first < mark:
            op = self.ops.pop(0)
            op.apply(self.floor)
            self.floor_policy = op.policy_after(self.floor_policy)
            self.floor_filling = op.filling_after(self.floor_filling)
            self.first += 1

    def judge(
        self,
        found: bytes,
        *,
        everything: bool,
        unreadable: Collection[int] = (),
        policy: str | None = None,
        filling: bool | None = None,
    ) -> None:
        """`found`, `policy` and `filling` is what a crash has left. Raises OracleError unless it may be; then it is so.

        `unreadable`: blocks that are errors to their readers, whose bytes in `found` mean nothing. `policy` or
        `filling` None: as the last operation left it.
        """
        there = self.policy if policy is None else policy, self.filling if filling is None else filling
        least = len(self.ops) if everything else 0
        for last in dict.fromkeys((self.in_flight, self.in_doubt)):
            ops = [*self.ops, *([last] if last else [])]
            state, wanted = bytearray(self.floor), (self.floor_policy, self.floor_filling)
            for k in range(len(ops) + 1):
                if k >= least and wanted == there:
                    if _same(state, found, unreadable):
                        self.adopt(state, *wanted)
                        return
                    if k < len(ops) and ops[k].size is None:
                        part = _part_of(state, ops[k].changes, found, unreadable)
                        part = part or _part_of(state, ops[k].attempted, found, unreadable)
                        if part is not None:
                            self.adopt(part, *wanted)
                            return
                if k < len(ops):
                    ops[k].apply(state)
                    wanted = ops[k].policy_after(wanted[0]), ops[k].filling_after(wanted[1])
        raise OracleError(self._explain(found, there, ops, least))

    def _explain(self, found: bytes, there: tuple[str, bool], ops: Sequence[Op], least: int) -> str:
        state = bytearray(self.floor)
        best: tuple[int, int, list[int]] | None = None
        for k in range(len(ops) + 1):
            if k >= least:
                size = max(len(state), len(found))
                bad = [b for b in range(0, size, BLOCK) if state[b : b + BLOCK] != found[b : b + BLOCK]]
                if best is None or len(bad) < len(best[2]):
                    best = (k, len(state), bad)
            if k < len(ops):
                ops[k].apply(state)
        assert best is not None
        k, size, bad = best
        around = [f"{i}: {ops[i].what}" for i in range(max(0, k - 2), min(len(ops), k + 3))]
        return (
            f"no prefix of {len(ops)} operations (at least {least}) gives what is there ({len(found)} bytes, "
            f"policy and filling {there} after {(self.floor_policy, self.floor_filling)}); nearest is "
            f" {k} with {size} bytes and {len(bad)} wrong blocks {[b // BLOCK for b in bad[:8]]}; around: {around}"
        )

    def adopt(self, found: bytes | bytearray, policy: str = "", filling: bool = False) -> None:
        """This is the state now, durably."""
        self.policy = self.floor_policy = policy
        self.filling = self.floor_filling = filling
        self.content = bytearray(found)
        self.floor = bytearray(found)
        self.ops.clear()
        self.first = 0
        self.in_flight = self.in_doubt = None


def _same(state: bytearray, found: bytes, unreadable: Collection[int]) -> bool:
    if not unreadable or len(state) != len(found):
        return state == found
    return all(
        at // BLOCK in unreadable or state[at : at + BLOCK] == found[at : at + BLOCK]
        for at in range(0, len(state), BLOCK)
    )


def _part_of(state: bytearray, changes: Changes, found: bytes, unreadable: Collection[int]) -> bytearray | None:
    """`state` and so much of `changes` that it is `found`: the first of them, and of the next some blocks."""
    if len(found) != len(state):
        return None
    before = state
    for offset, data in changes:
        after = bytearray(before)
        after[offset : offset + len(data)] = data
        mixed = bytearray(before)
        for at in range(offset // BLOCK * BLOCK, offset + len(data), BLOCK):
            if found[at : at + BLOCK] == after[at : at + BLOCK]:
                mixed[at : at + BLOCK] = after[at : at + BLOCK]
        if _same(mixed, found, unreadable):
            return mixed
        before = after
    return None


async def read_all(volume: Reader) -> bytes:
    """The whole volume or snapshot, through the slow path."""
    into = bytearray(volume.size_bytes)
    await volume.read(0, len(into), memoryview(into))
    return bytes(into)


def lost_blocks(content: bytes | bytearray, offset: int = 0, length: int | None = None) -> set[int]:
    """The blocks of a model's content, or those that a range of it touches, that are lost."""
    end = len(content) if length is None else min(offset + length, len(content))
    return {
        at // BLOCK
        for at in range(offset // BLOCK * BLOCK, end, BLOCK)
        if content[at : at + BLOCK] == LOST[: len(content) - at]
    }


async def read_what_can_be(volume: Reader) -> tuple[bytes, set[int]]:
    """The whole volume or snapshot, and which of its blocks are errors: these read as `LOST` here."""
    try:
        return await read_all(volume), set()
    except TierError as error:
        if error.errno != errno.EIO:
            raise
    found = bytearray(volume.size_bytes)
    unreadable = set()
    for at in range(0, len(found), BLOCK):
        try:
            await volume.read(at, len(found[at : at + BLOCK]), memoryview(found)[at : at + BLOCK])
        except TierError:
            unreadable.add(at // BLOCK)
            found[at : at + BLOCK] = LOST[: len(found) - at]
    return bytes(found), unreadable


LOST_PROBLEM = (
    r"lost to a device error$|(block is|blocks are) lost: a device had an error, or no leg of a mirror could read "
    r"(it|them)$"
)
"""How a problem of a check ends that says which blocks are lost (`tiers.losses.lost_in_words`)."""


async def require_sound(pool: Pool, *, known: str = "(?!)") -> None:
    """`pool check --full` finds nothing, but for problems that `known` matches."""
    report = await pool.check(full=True)
    problems = [problem for problem in report.problems if not re.search(known, problem)]
    if problems or report.ok != (not report.problems):
        raise OracleError(f"pool check: {problems[:5]}")
