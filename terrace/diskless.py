"""A mirror as a node without a leg has it: this node may be its primary all the same, over the legs of others.

**What is kept.** `HOME/mirrors/ID.json` says that this node takes part, and under which name; it is written before the
first promotion and goes with a demotion (`Participation`). The records of the mirror are kept as a voter keeps them, in
`HOME/voters/ID.json` (`replication.voters`): the one by which this node is primary it stores last, the one that takes
that from it first, so that it knows after a restart what it would know from a leg. It has a say only where it is a
voter.

**A restart.** If this node is the primary by what is kept here, it first asks the others. If they have a later record
of another primary it is deposed: it says so, and serves nothing until it is told to. Else it goes on as a primary with
a leg does, in a new term, when the legs in sync were heard.

**When all legs are away** there is nobody else to go on with. Their sessions are kept and resumed for `PATIENCE_S`, so
what clients have in flight waits. If meanwhile another node was made primary, the legs take nothing from this one any
more, and nobody here has promised anything: so it is asked for (`_look_out`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from replication.cluster import VoterState
from replication.durable import make_directory, remove_file, replace_file
from replication.keeper import term_from_json, term_to_json
from replication.leg import Leg, LegStore
from replication.lineage import are_apart, last_of_others
from replication.membership import LegInfo, Membership, Term, decode, encode
from replication.site import MirrorSettings
from replication.voters import ask, in_sync_nodes, is_majority, rule_of
from terrace.exports import ExportRecord, StoodFor
from terrace.primary import ASK_S, MirrorPart, ServedMirror, Surroundings, nodes_of, nodes_of_mirror
from tiers.names import validate_name
from tiers.policy import DEFAULT_NAME

log = logging.getLogger("terraced")

FORMAT_VERSION: Final = 1
DIRECTORY: Final = "mirrors"
"""In the home."""
PATIENCE_S: Final = 3600.0
FIRST_LEG_S: Final = 10.0
"""A beginning waits for its first leg, since there is nothing else to begin with."""
LOOK_S: Final = 1.0


@dataclass(frozen=True)
class Participation:
    """What HOME/mirrors/ID.json says, JSON in UTF-8; replaced whole by a rename, so a crash leaves the old or the new.

    | field | type | meaning |
    |---|---|---|
    | version | int | `FORMAT_VERSION`; another one is refused |
    | name | str | POOL/VOL, under which clients get it here |
    | since | float | seconds since the epoch |
    | membership | object | a record of the mirror, as `replication.membership.encode`; later ones are in HOME/voters |
    | elsewhere | [int, str] or null | the last term before that record in which another node was primary |
    """

    name: str
    since_s: float
    membership: Membership
    elsewhere: Term | None = None
    """What was known of the mirror here before that term, in memory, is not to be relied on."""

    def encode(self) -> bytes:
        """For the file."""
        plain = {
            "version": FORMAT_VERSION,
            "name": self.name,
            "since": self.since_s,
            "membership": json.loads(encode(self.membership)),
            "elsewhere": term_to_json(self.elsewhere),
        }
        return json.dumps(plain, sort_keys=True).encode()

    @staticmethod
    def decode(data: bytes) -> Participation:
        """Judges what a disk says. Raises OSError EPROTO with a sentence."""
        try:
            plain = json.loads(data)
            if plain["version"] != FORMAT_VERSION:
                raise OSError(
                    errno.EPROTO,
                    f"it has version {plain['version']}, and {FORMAT_VERSION} is understood; use the version of "
                    "Terrace that wrote it, or a later one",
                )
            since = plain["since"]
            if type(since) not in (int, float):
                raise ValueError(f"{since!r} is no time")
            require_name(plain["name"])
            membership = decode(json.dumps(plain["membership"]).encode())
            elsewhere = term_from_json(plain.get("elsewhere"))  # not in what the first releases wrote
            return Participation(plain["name"], float(since), membership, elsewhere)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OSError(errno.EPROTO, f"it can't be understood: {error!r}") from None


def require_name(name: object) -> tuple[str, str]:
    """POOL/VOL, as (pool, volume). Raises OSError EINVAL."""
    if not isinstance(name, str) or name.count("/") != 1:
        raise OSError(errno.EINVAL, f"{str(name)[:128]!r} doesn't name a volume; write POOL/VOL")
    pool, _, volume = name.partition("/")
    validate_name("pool", pool)
    validate_name("volume", volume)
    return pool, volume


def path_of(home: Path, mirror: str) -> Path:
    """Where the participation in a mirror is kept. Raises OSError EINVAL for what is no mirror's id."""
    if not re.fullmatch("[0-9a-f]{32}", mirror):  # it comes from peers, and becomes part of a path
        raise OSError(errno.EINVAL, f"{mirror[:64]!r} is no mirror's id: that is 32 hexadecimal digits")
    return home / DIRECTORY / f"{mirror}.json"


def store(path: Path, data: bytes) -> None:
    """Blocks. Durable on return."""
    make_directory(path.parent)
    replace_file(path, data)


class DisklessVolume:
    """Stands for the volume that isn't here: implements `terrace.exports.StoodFor`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open_count = 0

    @property
    def open_count(self) -> int:
        return self._open_count

    def acquire(self) -> None:
        self._open_count += 1

    def release(self) -> None:
        assert self._open_count > 0, f"{self.name} was released more often than acquired"
        self._open_count -= 1


class DisklessMirror(MirrorPart):
    """See the module. `begin` comes before `run`."""

    def __init__(self, home: Path, participation: Participation, node: Surroundings) -> None:
        super().__init__(node)
        self.participation = participation
        self._home = home
        self._stood_for = DisklessVolume(participation.name)
        self._record = participation.membership

    # -- what a node has of a mirror -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.participation.name

    @property
    def stood_for(self) -> StoodFor:
        return self._stood_for

    @property
    def size_bytes(self) -> int:
        return self.membership.size_bytes

    @property
    def policy_name(self) -> str:
        return DEFAULT_NAME

    @property
    def store(self) -> LegStore | None:
        return None

    @property
    def me(self) -> str:
        return ""

    @property
    def accepted(self) -> Membership | None:
        return self._record

    @property
    def intact(self) -> bool:
        return False  # there is nothing here that could be

    @property
    def rotational(self) -> bool:
        return False

    @property
    def mirror_id(self) -> str:
        """The mirror's."""
        return self._record.mirror

    @property
    def record(self) -> ExportRecord:
        """For who makes files or devices of it."""
        return ExportRecord(
            name=self.name,
            identity=self.identity,
            size_bytes=self.membership.size_bytes,
            allocated_bytes=0,  # here
            read_only=False,
            created_at=self.participation.since_s,
        )

    @property
    def identity(self) -> str:
        """See `ExportRecord`."""
        own, elsewhere = f"mirror/{self.mirror_id}", self.participation.elsewhere
        return own if elsewhere is None else f"{own}/{elsewhere.number}-{elsewhere.id}"

    def where(self) -> str:
        """The nodes with legs, for sentences."""
        nodes = nodes_of(self.membership.legs)
        return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {', '.join(nodes[:-1])} and {nodes[-1]}"

    def refusal(self) -> OSError:
        primary = self._record.primary
        if self.problem is None and primary != self._node.peers.node:
            who = f"whose primary is node {primary}: use it there" if primary else "that has no primary now"
            return OSError(
                errno.EBUSY,
                f"{self.name} is a mirror {who}; `terrace volume mirror promote {self.name}` makes this node the "
                f"primary again, `terrace volume mirror forget {self.name}` lets it have nothing to do with it",
            )
        return super().refusal()

    # -- life ----------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take up what is kept. Raises OSError EPROTO for what a voter's file says that can't be understood."""
        await self._recall()
        self._node.own_voter.on_fence.append(self._fenced)
        self._begin_as_before()

    async def keep(self) -> None:
        """Write down that this node takes part; durable on return. Raises OSError."""
        path = path_of(self._home, self.mirror_id)
        try:
            await trio.to_thread.run_sync(store, path, self.participation.encode())
        except OSError as error:
            raise OSError(
                error.errno, f"{path} can't be written, so {self.name} can't be served here: {error.strerror}"
            ) from None

    async def unkeep(self) -> None:
        """Take back what `keep` has written."""
        await trio.to_thread.run_sync(remove_file, path_of(self._home, self.mirror_id))

    async def forget(self) -> None:
        """End, and remove what is kept; not what a voter has to keep. Raises OSError."""
        await self.close()
        # Records since this term began may have made this node a voter: one must not forget its promises.
        readable = True
        try:
            await self._recall()
        except OSError:
            readable = False
        await self.unkeep()
        if readable and self._node.peers.node not in self._record.voters:
            await self._node.own_voter.forget(self.mirror_id)

    async def _take_part(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _open_here(self, nursery: trio.Nursery, info: LegInfo, membership: Membership) -> Leg:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENOENT, f"node {self._node.peers.node} has no leg of {self.name}")

    async def _leave(self) -> None:
        if self._fenced in self._node.own_voter.on_fence:
            self._node.own_voter.on_fence.remove(self._fenced)
        await trio.lowlevel.checkpoint()

    async def _settle_as_replica(self) -> None:
        with contextlib.suppress(OSError):
            await self._recall()
        if self.problem is None and self._record.primary == self._node.peers.node and not self._closing.is_set():
            await self._learn()
            if self._record.primary != self._node.peers.node:
                self.problem = self._deposed()
                self._tell_problem(self.problem)
            else:
                # What is known here says that it is the primary still: whether it may go on, the next try finds out.
                self.problem = OSError(errno.ESTALE, "its term was ended by a promise to another node")

    # -- whether this node is still it ---------------------------------------------------------------------------

    async def _proven(self, *, force: bool, serving: Term | None = None) -> Membership:
        was_primary = self.is_named_primary
        await self._learn()
        if was_primary and not self.is_named_primary and not force:
            raise self._deposed()
        self._record = record = await super()._proven(force=force, serving=serving)
        # Durable before clients get it under its identity, and of each term: a later one finds it in the history.
        known = self.participation
        elsewhere = last_of_others(record, known.membership, self._node.peers.node) or known.elsewhere
        self.participation = dataclasses.replace(known, membership=record, elsewhere=elsewhere)
        await self.keep()
        return record

    def _deposed(self) -> OSError:
        record = self._record
        who = f"node {record.primary} is its primary" if record.primary else "it was demoted"
        return OSError(
            errno.ESTALE,
            f"this node is not its primary any more: {who} since term {record.term.number}; `terrace volume mirror "
            f"promote {self.name}` takes it back once it is demoted there, `terrace volume mirror forget {self.name}` "
            "gives it up",
        )

    async def _recall(self) -> None:
        """The newest record that this node has stored."""
        try:
            kept = (await self._node.own_voter.state(self.mirror_id)).accepted
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return
        if kept is not None and kept.place >= self._record.place:
            self._record = kept

    async def _learn(self) -> None:
        """Whether others have a later record: then it is stored here too."""
        records = {node: state.accepted for node, state in (await self._states()).items() if state.accepted is not None}
        # The other side of a split brain isn't followed, whatever its number is: only an operator decides that.
        same_side = [record for node, record in records.items() if not self._is_apart(record, node)]
        newest = max(same_side, key=lambda record: record.place, default=self._record)
        if newest.place <= self._record.place:
            return
        self._record = newest
        # A participation without a voter's file was never primary, and needs no record.
        with contextlib.suppress(OSError):
            if (await self._node.own_voter.state(self.mirror_id)).accepted is not None:
                await self._node.own_voter.accept(newest)

    def _is_apart(self, theirs: Membership, node: str) -> bool:
        return are_apart(self._record, "", theirs, next((leg.id for leg in theirs.legs_on(node)), ""))

    async def _states(self) -> dict[str, VoterState]:
        membership = self.membership
        nodes = tuple(node for node in nodes_of_mirror(membership) if node != self._node.peers.node)
        states, _ = await ask(
            nodes,
            lambda node: self._node.voter(node).state(membership.mirror),
            lambda answers: len(answers) == len(nodes),
            timeout_s=min(ASK_S, membership.options.timeout_s),
        )
        return states

    def _fenced(self, mirror: str, term: Term) -> None:
        """This node has promised a term."""
        served = self.mirror
        if served is not None and mirror == self.mirror_id and term > served.membership.term:
            served.fence(OSError(errno.ESTALE, f"later term {term.number} promised to another primary"))

    async def _look_out(self, mirror: ServedMirror) -> None:
        """With no leg at hand, or where no record without those that are gone counts: whether that is because another
        node is primary, or was about to be."""
        while True:
            await trio.sleep(LOOK_S)
            is_stuck = mirror.lost or (mirror.excluding and mirror.records.outdated)
            if not is_stuck or mirror.ended.is_set():
                continue
            membership = mirror.membership
            states = await self._states()
            if (why := superseded(membership, states)) is not None:
                mirror.fence(OSError(errno.ESTALE, why))

    _settings = MirrorSettings(first_leg_s=FIRST_LEG_S)
    _insists = True

    def _link_timeout_s(self, membership: Membership) -> float:
        return max(PATIENCE_S, membership.options.timeout_s)


def superseded(ours: Membership, states: dict[str, VoterState]) -> str | None:
    """Why the term of `ours`, which lacks legs, can't go on by what others say; None: it may. Pure.

    Not by one promise to another node alone: that may have come to nothing, and a leg come back that didn't give it.
    But where a majority decides, and none is left, no record of this term counts any more.
    """
    records = [state.accepted for state in states.values() if state.accepted is not None]
    newest = max(records, key=lambda record: record.place, default=ours)
    if newest.term.number > ours.term.number:
        who = f"node {newest.primary}" if newest.primary else "nobody"
        return f"{who} is primary since term {newest.term.number}"
    needed = in_sync_nodes(ours)
    later = {
        node
        for node, state in states.items()
        if state.promised is not None and state.promised.number > ours.term.number
    }
    if needed <= later:
        return f"every leg in sync has promised a later term to {_candidates(states, needed)}"
    if rule_of(ours) == "majority" and not is_majority(set(ours.voters) - later, ours.voters):
        voters = frozenset(later) & set(ours.voters)
        count = f"{len(voters)} of {len(set(ours.voters))} voters"
        return f"{count} have promised a later term to {_candidates(states, voters)}"
    return None


def _candidates(states: dict[str, VoterState], nodes: frozenset[str]) -> str:
    found: frozenset[Any] = frozenset().union(*(states[node].candidates for node in nodes))
    return " or ".join(sorted(found - {""})) or "another node"


def participation(name: str, membership: Membership, node: str) -> Participation:
    """A new one of this node, from now on. Raises OSError EINVAL for a name that is none."""
    require_name(name)
    others = [one.term for one in (*membership.history, membership.generation) if one.primary not in (None, node)]
    return Participation(name, time.time(), membership, max(others, key=lambda term: term.number, default=None))
