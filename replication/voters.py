"""Who must have stored a record before it counts, and the nodes that store them.

A **voter** is a node's say about a mirror: in the records of its legs (`replication.keeper`), or in a file of the
daemon's home where it has no leg. `KeptVoter` is this node's, `RemoteVoter` another's.

A record counts when it is stored (`LegsCluster.commit`):

- **all** (fewer than three voters): at every leg of its own `in_sync`. Whoever wants to go on from an older record must
  hear all legs of that one, and so finds it.
- **majority** (three or more): also at a majority of the voters, by the record before it and by its own list.
- **etcd**: there, before it is at the legs; see `replication.etcd`.

**The order.** A primary that is restarted may go on alone if its own record says that nobody else can have
(`replication.promotion`). So what it has stored itself must never be behind what counts:

- A record by which it could go on alone it stores itself *last*. If it doesn't get there, the record has never counted.
- A record that takes this from it (a demotion; its own leg leaves `in_sync`) it stores itself *first*. It counts
  without that leg: were it stored at the others first, and the primary killed, both could go on.
  A primary whose disk is dead stores it in its home.

**What is in doubt.** ETIMEDOUT from `commit` says that the record may come to count. The same one may be tried again,
since `accept` is idempotent; a primary may also write another, made from it. None may be made from its predecessor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import trio

from replication.cluster import NotStoredError, Voter, VoterState
from replication.durable import make_directory, remove_file, replace_file
from replication.keeper import (
    LegKeeper,
    is_superseded,
    judge_accept,
    judge_prepare,
    still_superseded,
    term_from_json,
    term_to_json,
)
from replication.lease import Clock, VoterLease, boottime
from replication.membership import Membership, Term, decode, encode

FORMAT_VERSION = 1
DECIDED = frozenset({errno.ESTALE, errno.EUCLEAN, errno.EINVAL, errno.EBUSY, errno.EPROTO})
"""Errors by which a voter has answered: asking again gives the same."""
UNABLE = frozenset({errno.EROFS, errno.ENOSPC, errno.EIO})
"""Errors of a voter whose disk has failed, or is full."""

MAX_MIRRORS = 1024
"""So many mirrors a node may be a tie-breaker of. Files are made by the records of peers, and by nothing else."""
MAX_RETIRED = 64
"""So many mirrors that a node is no voter of any more it remembers; see `KeptVoter.retire`."""

NO_TERRACE_LEG = "at least one Terrace leg must be in sync: an NBD server stores no records"

T = TypeVar("T")
Rule = Literal["all", "majority", "etcd"]


def rule_of(membership: Membership) -> Rule:
    """By which rule the successor of this record comes to count."""
    if membership.options.arbiter == "etcd":
        return "etcd"
    return "majority" if len(membership.voters) >= 3 else "all"


def is_majority(nodes: Iterable[str], voters: Sequence[str]) -> bool:
    """Whether more than half of the voters are among these nodes."""
    return 2 * len(set(nodes) & set(voters)) > len(set(voters))


def in_sync_nodes(membership: Membership) -> frozenset[str]:
    """The nodes with a Terrace leg in sync: an NBD server stores no records."""
    return frozenset(leg.node for leg in membership.legs if leg.id in membership.in_sync and leg.kind == "terrace")


def counts(new: Membership, expected: Membership | None, stored: frozenset[str]) -> bool:
    """Whether `new` counts when these nodes have stored it; `expected` is the record that it follows."""
    if not in_sync_nodes(new) <= stored:
        return False
    if rule_of(new) == "majority" and not is_majority(stored, new.voters):
        return False
    followed = expected is not None and new.forced == "no" and rule_of(expected) == "majority"
    return not followed or (expected is not None and is_majority(stored, expected.voters))


def goes_first(node: str, new: Membership, expected: Membership) -> bool:
    """Whether this node, which makes the record, stores its own copy first; see the module."""
    own = {leg.id for leg in (*new.legs_on(node), *expected.legs_on(node))}
    leaves = bool(own & expected.in_sync - new.in_sync) and not own & new.in_sync
    return new.primary != node or leaves


# This node's


class KeptVoter:
    """This node's say about all mirrors that it has legs of or is a voter of."""

    def __init__(
        self,
        node: str,
        home: Path,
        legs: Callable[[str], Sequence[LegKeeper]],
        *,
        is_primary: Callable[[str], bool] = lambda mirror: False,
        clock: Clock = boottime,
    ) -> None:
        self.node = node
        self.on_fence: list[Callable[[str, Term], None]] = []
        """Called synchronously with mirror and term when a promise kept in the home has risen."""
        self._directory = home / "voters"
        self._legs = legs
        self._is_primary = is_primary
        self._lease = VoterLease(clock)
        self._files: dict[str, _Kept | None] = {}
        """Only of mirrors that there is a file or a leg of: whatever ids peers make up, nothing grows."""
        self._locks: dict[str, trio.Lock] = {}
        """Those that somebody has or waits for."""

    def heard(self, mirror: str) -> None:
        """The primary has shown that it is alive, by a session for instance. Gives it no lease: `heartbeat` does."""
        self._lease.heard(mirror)

    async def mirrors(self) -> frozenset[str]:
        """All that the home has records of."""
        return frozenset(await trio.to_thread.run_sync(_names, self._directory))

    async def state(self, mirror: str) -> VoterState:
        """Raises OSError ENOENT; EPROTO if the record in the home can't be read."""
        return await self._say(mirror, await self._file(mirror))

    async def prepare(self, mirror: str, term: Term, candidate: str, *, force: bool = False) -> VoterState:
        """Raises OSError ESTALE, EBUSY, ENOENT, EPROTO, EIO."""
        async with self._holding(mirror):
            file = await self._file(mirror)
            said = await self._say(mirror, file)
            judge_prepare(said.promised, term, f"node {self.node}")
            if not force:
                self._judge_alive(said, candidate)
            no_writes = await self._promise(mirror, file, term, candidate)
            # A session may have stored a record while the promise waited for it: it counts, and none comes any more.
            now = await self._say(mirror, await self._file(mirror))
            candidates = said.candidates if now.accepted == said.accepted else frozenset()
            return dataclasses.replace(now, promised=term, candidates=candidates, no_writes=now.no_writes or no_writes)

    async def _promise(self, mirror: str, file: _Kept | None, term: Term, candidate: str) -> str | None:
        """Why a leg that is out couldn't store it, where the home has: so it can't store a record. Raises OSError."""
        no_writes = None
        for keeper in self._legs(mirror):
            try:
                await keeper.prepare(term, candidate)
            except OSError as error:
                if error.errno in DECIDED or file is None or not _is_out(keeper.record.me, file.accepted):
                    raise
                no_writes = error.strerror or str(error)
        if file is not None:
            candidates = file.candidates | ({candidate} if term != file.promised else frozenset())
            await self._keep(mirror, dataclasses.replace(file, promised=term, candidates=candidates))
        return no_writes

    def _judge_alive(self, said: VoterState, candidate: str) -> None:
        accepted = said.accepted
        if accepted is None:
            return
        # Who has answered a heartbeat of a later term may not have got its record: then it can't know who is primary.
        later = self._lease.term(accepted.mirror) > accepted.term.number
        if rule_of(accepted) == "majority" and self._lease.heard_s(accepted.mirror) is None:
            # Nor who was just started, and whose promise may be to one that it heard before (`heartbeat`).
            later = said.promised is not None and said.promised.number > accepted.term.number
        if not later and accepted.primary in (None, candidate):
            return
        if said.primary_here:
            raise OSError(errno.EBUSY, f"node {self.node} is primary and alive: demote it there first")
        needs_lease = rule_of(accepted) != "all"
        primary = "of a later term" if later else f"node {accepted.primary}"
        left_s = self._lease.left_s(accepted.mirror, accepted.options.lease_s, since_start=needs_lease)
        if left_s > 0:
            raise OSError(
                errno.EBUSY,
                f"node {self.node} may promise nothing for {left_s:.1f} s: it has heard the primary, "
                f"{primary}, or was just started: demote that one, or wait",
            )

    async def accept(self, membership: Membership) -> None:
        """Raises OSError ESTALE, EUCLEAN, EINVAL, ENOENT, EIO."""
        async with self._holding(membership.mirror):
            file = await self._file(membership.mirror)
            keepers = self._legs(membership.mirror)
            homed = file is not None or not keepers
            if membership.in_sync & {leg.id for leg in membership.legs_on(self.node)} - _ids(keepers):
                raise OSError(errno.ENOENT, f"node {self.node} doesn't have its leg of mirror {membership.mirror} open")
            if homed and file is None and self.node not in (*membership.voters, membership.primary):
                raise OSError(errno.EINVAL, f"node {self.node} is no voter of mirror {membership.mirror}")
            for keeper in keepers:
                try:
                    await keeper.accept(membership)
                except OSError as error:
                    if error.errno in (errno.ESTALE, errno.EUCLEAN):
                        await self._heard_of_accept(keeper, membership)
                    # A leg that is out, on a disk that is dead: the home must know it, or the leg could go on alone.
                    if error.errno in DECIDED or not _is_out(keeper.record.me, membership):
                        raise
                    homed = True
            if homed:
                if file is None and not keepers:
                    await self._judge_room()
                before = file or _Kept()
                if judge_accept(before.promised, before.accepted, membership, f"node {self.node}"):
                    superseded = still_superseded(before.superseded, membership)
                    await self._keep(membership.mirror, _Kept(membership.term, membership, superseded=superseded))

    async def _judge_room(self) -> None:
        """Whether there may be one more mirror in the home. Raises OSError ENOSPC."""
        if len(await self.mirrors()) >= MAX_MIRRORS:
            raise OSError(
                errno.ENOSPC,
                f"node {self.node} is a voter of {MAX_MIRRORS} mirrors that it has no leg of, which is the most: "
                "remove it from some, or take another node",
            )

    async def _heard_of_accept(self, keeper: LegKeeper, refused: Membership) -> None:
        """Who says `accept` is primary by that record, or about to be; one of an earlier term may be fenced since."""
        own = keeper.record.accepted
        if refused.primary is None or own is None or refused.term.number < own.term.number:
            return
        if not self._is_primary(refused.mirror):
            with contextlib.suppress(OSError):  # it is refused in any case, and that is what the caller is to hear
                await keeper.heard_of(refused, refused.primary, served=True)

    async def heard_of(self, record: Membership, node: str, *, served: bool) -> None:
        """As `LegKeeper.heard_of`, for whatever this node goes on from. Raises OSError."""
        async with self._holding(record.mirror):
            for keeper in self._legs(record.mirror):
                await keeper.heard_of(record, node, served=served)
            file = await self._file(record.mirror)
            if file is not None and is_superseded(
                file.accepted, "", self.node, file.superseded, record, node, served=served
            ):
                await self._keep(record.mirror, dataclasses.replace(file, superseded=record))

    async def heartbeat(self, mirror: str, term: Term) -> None:
        """Raises OSError ESTALE, ENOENT."""
        # Under the lock: a promise that is being stored must not be followed by a lease for the primary before it.
        async with self._holding(mirror):
            # Only what is needed of `_say`: this is asked many times in a lease, of each mirror.
            file = await self._file(mirror)
            promised = self._promised(mirror, file)
            judge_prepare(promised, term, f"node {self.node}")
            if term != promised and self._by_majority(mirror, file):
                # It has missed the record of that primary. After a restart nothing else would say that there is one.
                await self._promise(mirror, file, term, "")
            self._lease.heard(mirror, term.number)

    def _by_majority(self, mirror: str, file: _Kept | None) -> bool:
        records = [keeper.record.accepted for keeper in self._legs(mirror)] + [file.accepted if file else None]
        return any(record is not None and rule_of(record) == "majority" for record in records)

    async def forget(self, mirror: str) -> None:
        """The whole mirror is gone."""
        async with self._holding(mirror):
            await trio.to_thread.run_sync(remove_file, self._path(mirror))
            self._files.pop(mirror, None)
            self._lease.forget(mirror)

    async def retire(self, record: Membership) -> None:
        """This node is no voter any more by this record, which counts, or gives up its leg: it keeps both in its home.

        Who hasn't heard of that believes that it is a voter still. A primary that was fenced must not make a record
        count here, and a candidate must find that there is a later one than it knows. Of the `MAX_RETIRED` newest
        mirrors: by then nobody asks. Raises OSError.
        """
        async with self._holding(record.mirror):
            file = await self._file(record.mirror)
            promises = [record.term, *(keeper.record.promised for keeper in self._legs(record.mirror))]
            promises.append(file.promised if file is not None else None)
            newest = max((one for one in promises if one is not None), key=lambda one: one.number)
            await self._keep(record.mirror, _Kept(newest, record))
            for gone in await trio.to_thread.run_sync(_forget_oldest, self._directory, self.node):
                self._files.pop(gone, None)
            self._lease.forget(record.mirror)

    @contextlib.asynccontextmanager
    async def _holding(self, mirror: str) -> AsyncIterator[None]:
        """One change at a time, and no lock is left of a mirror that nobody changes."""
        # No checkpoint between finding the lock and having it, or waiting for it: it can't be thrown away in between.
        lock = self._locks.setdefault(mirror, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(mirror, None)

    def _promised(self, mirror: str, file: _Kept | None) -> Term | None:
        """The highest term that its legs and its home have promised. Raises OSError ENOENT."""
        keepers = self._legs(mirror)
        if file is None and not keepers:
            raise OSError(errno.ENOENT, f"node {self.node} knows nothing of a mirror {mirror}")
        promises = [keeper.record.promised for keeper in keepers]
        if file is not None:
            promises.append(file.promised)
        return max((one for one in promises if one), key=lambda one: one.number, default=None)

    async def _say(self, mirror: str, file: _Kept | None) -> VoterState:
        promised, keepers = self._promised(mirror, file), self._legs(mirror)
        records: list[Membership | None] = [keeper.record.accepted for keeper in keepers]
        candidates = frozenset[str]().union(*(keeper.record.candidates for keeper in keepers))
        beyond: list[Membership | None] = [keeper.record.superseded for keeper in keepers]
        if file is not None:
            records.append(file.accepted)
            candidates |= file.candidates
            beyond.append(file.superseded)
        accepted = max((one for one in records if one), key=lambda one: one.place, default=None)
        voices = [one for one in keepers if accepted and one.record.me in accepted.in_sync] or list(keepers)
        return VoterState(
            node=self.node,
            promised=promised,
            accepted=accepted,
            candidates=candidates,
            primary_here=self._is_primary(mirror),
            heard_s=self._lease.heard_s(mirror),
            intact=all(one.intact for one in voices),
            inconsistent=any(one.record.inconsistent for one in voices),
            recent_bytes=sum(_recent_bytes(one) for one in voices),
            superseded=max((one for one in beyond if one), key=lambda one: one.place, default=None),
            no_writes=next((why for one in keepers if (why := one.store.no_writes) is not None), None),
        )

    def _path(self, mirror: str) -> Path:
        # It comes from peers, and becomes part of a path.
        if not re.fullmatch("[0-9a-f]{32}", mirror):
            raise OSError(errno.EINVAL, f"{mirror[:64]!r} is no mirror's id: that is 32 hexadecimal digits")
        return self._directory / f"{mirror}.json"

    async def _file(self, mirror: str) -> _Kept | None:
        path = self._path(mirror)
        if mirror in self._files:
            return self._files[mirror]
        kept = await trio.to_thread.run_sync(_load, path)
        if kept is not None or self._legs(mirror):
            return self._files.setdefault(mirror, kept)
        return self._files.get(mirror)

    async def _keep(self, mirror: str, kept: _Kept) -> None:
        """Durable on return. If it fails, the one before remains what is believed; see `replication.keeper`."""
        before = self._files.get(mirror)
        await trio.to_thread.run_sync(_store, self._path(mirror), kept.encode())
        self._files[mirror] = kept
        if kept.promised is not None and (before is None or before.promised != kept.promised):
            for fenced in list(self.on_fence):
                fenced(mirror, kept.promised)


def _is_out(leg_id: str, membership: Membership | None) -> bool:
    return membership is not None and leg_id not in membership.in_sync


def _ids(keepers: Sequence[LegKeeper]) -> set[str]:
    return {keeper.record.me for keeper in keepers}


def _recent_bytes(keeper: LegKeeper) -> int:
    return sum(
        length
        for name in ("recent", "recent-old")
        if name in keeper.store.trackers
        for _, length in keeper.store.trackers[name].runs()
    )


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A voter's record in the home: HOME/voters/MIRROR.json, replaced whole by a rename."""

    promised: Term | None = None
    accepted: Membership | None = None
    candidates: frozenset[str] = frozenset()
    superseded: Membership | None = None
    """See `LegRecord`."""

    def encode(self) -> bytes:
        plain = {
            "version": FORMAT_VERSION,
            "promised": term_to_json(self.promised),
            "accepted": json.loads(encode(self.accepted)) if self.accepted else None,
            "candidates": sorted(self.candidates),
            "superseded": json.loads(encode(self.superseded)) if self.superseded else None,
        }
        return json.dumps(plain, sort_keys=True).encode()


def _load(path: Path) -> _Kept | None:
    try:
        plain = json.loads(path.read_bytes())
        if plain["version"] != FORMAT_VERSION:
            raise OSError(errno.EPROTO, f"{path} has version {plain['version']}, and {FORMAT_VERSION} is understood")
        accepted, superseded = plain["accepted"], plain.get("superseded")
        return _Kept(
            term_from_json(plain["promised"]),
            decode(json.dumps(accepted).encode()) if accepted is not None else None,
            frozenset(plain["candidates"]),
            decode(json.dumps(superseded).encode()) if superseded is not None else None,
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        # A voter that has forgotten its promises must not vote.
        raise OSError(
            errno.EPROTO, f"{path} can't be understood ({error!r}); remove this node from the mirror's voters, then it"
        ) from None


def _store(path: Path, data: bytes) -> None:
    """Blocks."""
    make_directory(path.parent)
    replace_file(path, data)


def _forget_oldest(directory: Path, node: str) -> list[str]:
    """Remove all but the newest files of mirrors that the node is no voter of any more; which these are. Blocks."""
    retired = []
    for path in directory.glob("*.json"):
        with contextlib.suppress(OSError):
            kept = _load(path)
            if kept is not None and kept.accepted is not None and node not in kept.accepted.voters:
                retired.append((path.stat().st_mtime_ns, path))
    gone = [path for _, path in sorted(retired)[:-MAX_RETIRED]]
    for path in gone:
        remove_file(path)
    return [path.stem for path in gone]


def _names(directory: Path) -> list[str]:
    return [path.stem for path in directory.glob("*.json")] if directory.is_dir() else []


# Another node's


class Caller(Protocol):
    """Calls to one peer; `replication.calls.Calls` is one."""

    async def call(self, method: str, params: dict[str, Any], timeout_s: float) -> Any:
        """Raises OSError: the peer's own, or ETIMEDOUT and what a connection raises."""


class RemoteVoter:
    """The voter of a peer."""

    def __init__(self, node: str, caller: Caller, *, timeout_s: float = 1.0) -> None:
        self.node = node
        self._caller = caller
        self._timeout_s = timeout_s

    async def state(self, mirror: str) -> VoterState:
        """As `Voter.state`; EPROTO for an answer that makes no sense."""
        return self._judged(await self._caller.call("voter.state", {"mirror": mirror}, self._timeout_s))

    async def prepare(self, mirror: str, term: Term, candidate: str, *, force: bool = False) -> VoterState:
        """As `Voter.prepare`."""
        params = {"mirror": mirror, "term": term_to_json(term), "candidate": candidate, "force": force}
        return self._judged(await self._caller.call("voter.prepare", params, self._timeout_s))

    async def accept(self, membership: Membership) -> None:
        """As `Voter.accept`."""
        params = {"membership": json.loads(encode(membership))}
        await self._caller.call("voter.accept", params, self._timeout_s)

    async def heartbeat(self, mirror: str, term: Term) -> None:
        """As `Voter.heartbeat`."""
        await self._caller.call("voter.heartbeat", {"mirror": mirror, "term": term_to_json(term)}, self._timeout_s)

    def _judged(self, plain: Any) -> VoterState:
        state = state_from_json(plain)
        if state.node != self.node:
            raise OSError(
                errno.EPROTO, f"the peer {self.node} says that it is node {state.node}; see [peers] and [node]"
            )
        return state


def state_to_json(state: VoterState) -> dict[str, Any]:
    """What `state_from_json` understands."""
    return dataclasses.asdict(state) | {
        "promised": term_to_json(state.promised),
        "accepted": json.loads(encode(state.accepted)) if state.accepted else None,
        "candidates": sorted(state.candidates),
        "superseded": json.loads(encode(state.superseded)) if state.superseded else None,
    }


def state_from_json(plain: Any) -> VoterState:
    """Judges what a peer says. Raises OSError EPROTO."""
    try:
        accepted, heard_s, superseded = plain["accepted"], plain["heard_s"], plain.get("superseded")
        return VoterState(
            node=_typed(plain["node"], str),
            promised=term_from_json(plain["promised"]),
            accepted=decode(json.dumps(accepted).encode()) if accepted is not None else None,
            candidates=frozenset(_typed(name, str) for name in plain["candidates"]),
            primary_here=_typed(plain["primary_here"], bool),
            heard_s=None if heard_s is None else float(heard_s),
            intact=_typed(plain["intact"], bool),
            inconsistent=_typed(plain["inconsistent"], bool),
            recent_bytes=_typed(plain["recent_bytes"], int),
            superseded=decode(json.dumps(superseded).encode()) if superseded is not None else None,
            no_writes=None if (why := plain.get("no_writes")) is None else _typed(why, str),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(errno.EPROTO, f"a voter's answer can't be understood: {error!r}") from None


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


Handler = Callable[[dict[str, Any]], Awaitable[Any]]


def handlers(voter: Voter) -> Mapping[str, Handler]:
    """What a node serves its peers: judges their parameters, EINVAL, and asks its own voter."""

    async def state(params: dict[str, Any]) -> Any:
        return state_to_json(await voter.state(_param(params, "mirror", str)))

    async def prepare(params: dict[str, Any]) -> Any:
        mirror, candidate = _param(params, "mirror", str), _param(params, "candidate", str)
        return state_to_json(await voter.prepare(mirror, _term(params), candidate, force=_param(params, "force", bool)))

    async def accept(params: dict[str, Any]) -> Any:
        await voter.accept(decode(json.dumps(params.get("membership")).encode()))

    async def heartbeat(params: dict[str, Any]) -> Any:
        await voter.heartbeat(_param(params, "mirror", str), _term(params))

    return {"voter.state": state, "voter.prepare": prepare, "voter.accept": accept, "voter.heartbeat": heartbeat}


def _param(params: dict[str, Any], name: str, kind: type) -> Any:
    if type(params.get(name)) is not kind:
        raise OSError(errno.EINVAL, f"a voter was asked with {name} {params.get(name)!r}, which is no {kind.__name__}")
    return params[name]


def _term(params: dict[str, Any]) -> Term:
    try:
        term = term_from_json(params.get("term"))
    except (ValueError, TypeError):
        term = None
    if term is None:
        raise OSError(errno.EINVAL, f"a voter was asked with term {params.get('term')!r}, which is none")
    return term


# All of them


class LegsCluster:
    """The truth as the legs' nodes and tie-breakers have stored it: a `ClusterStore`."""

    def __init__(
        self,
        node: str,
        voter: Callable[[str], Voter],
        known: Callable[[str], Awaitable[Sequence[str]]],
        *,
        timeout_s: float = 2.0,
    ) -> None:
        """`voter`: of a node, by its name. `known`: nodes that may know of a mirror, this one included if it is one.

        `timeout_s` bounds each round of questions: each method has one, and `newest` two where it has to.
        """
        self.node = node
        self._voter = voter
        self._known = known
        self._timeout_s = timeout_s

    async def newest(self, mirror: str) -> Membership:
        """Raises OSError ETIMEDOUT, naming who must answer; ENOENT if all have answered and nobody knows it."""
        states: dict[str, VoterState] = {}
        failures: dict[str, OSError] = {}
        nodes = tuple(await self._known(mirror))
        for _ in range(2):  # who came to the mirror since is named by those that were known
            found, unheard = await ask(
                nodes, lambda node: self._voter(node).state(mirror), lambda states: False, timeout_s=self._timeout_s
            )
            states, failures = states | found, failures | unheard
            records = {node: state.accepted for node, state in states.items() if state.accepted is not None}
            newest = max(records.values(), key=lambda one: one.place, default=None)
            named = (*newest.voters, *sorted(in_sync_nodes(newest))) if newest is not None else ()
            nodes = tuple(dict.fromkeys(node for node in named if node not in states and node not in failures))
        if newest is None:
            if all(error.errno == errno.ENOENT for error in failures.values()):
                raise OSError(errno.ENOENT, f"no node knows of a mirror {mirror}")
            raise OSError(errno.ETIMEDOUT, f"no voter of mirror {mirror} has answered: {_told(failures)}")
        stored = frozenset(node for node, record in records.items() if record == newest)
        if not counts(newest, None, stored):
            lacking = sorted(in_sync_nodes(newest) - stored) or sorted(set(newest.voters) - stored)
            raise OSError(
                errno.ETIMEDOUT,
                f"the newest record of mirror {mirror} can't be proven: it must be seen at {', '.join(lacking)} too"
                + (f" ({_told(failures)})" if failures else ""),
            )
        return newest

    async def create(self, first: Membership) -> None:
        """Raises OSError EEXIST, ETIMEDOUT; EINVAL."""
        if not in_sync_nodes(first):
            raise OSError(errno.EINVAL, NO_TERRACE_LEG)
        try:
            await self._spread(first, None, own_first=False)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise OSError(errno.EEXIST, f"there is a mirror {first.mirror} already: {error.strerror}") from None
            raise

    async def judge_candidate(self, mirror: str) -> None:
        """Never: what was promised decides."""
        await trio.lowlevel.checkpoint()

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        """Raises OSError ESTALE (somebody else went on), EINVAL, EUCLEAN; ETIMEDOUT: see the module."""
        judge_successor(new, expected)
        await self._spread(new, expected, own_first=goes_first(self.node, new, expected))

    async def _spread(self, new: Membership, expected: Membership | None, *, own_first: bool) -> None:
        own = await self._has_own(new)
        if own and own_first:
            await self._own(new)
        # Its own is counted already: if it isn't stored in the end, this raises.
        will_have = frozenset({self.node} if own else ())
        before = expected.voters if expected is not None else ()
        others = dict.fromkeys((*before, *new.voters, *sorted(in_sync_nodes(new))))
        others.pop(self.node, None)

        def enough(answers: Mapping[str, None]) -> bool:
            return counts(new, expected, will_have | frozenset(answers))

        answers, failures = await ask(
            tuple(others),
            lambda node: self._voter(node).accept(new),
            enough,
            timeout_s=self._timeout_s,
            needed=in_sync_nodes(new),
        )
        if not enough(answers):
            decided = [error for error in failures.values() if error.errno in DECIDED]
            number = (decided[0].errno if decided else None) or errno.ETIMEDOUT
            raise NotStoredError(
                number,
                f"record {new.term.number}.{new.epoch} of mirror {new.mirror} isn't stored: {_told(failures)}",
                _unable(new, failures),
            )
        if own and not own_first:
            await self._own(new)

    async def _has_own(self, new: Membership) -> bool:
        # Also where it has neither leg nor say: by its own record it knows after a restart what it would from a leg.
        if self.node in new.voters or new.legs_on(self.node) or self.node == new.primary:
            return True
        try:
            await self._voter(self.node).state(new.mirror)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    async def _own(self, new: Membership) -> None:
        with trio.move_on_after(self._timeout_s):
            try:
                return await self._voter(self.node).accept(new)
            except OSError as error:
                unable = _unable(new, {self.node: error})
                raise NotStoredError(error.errno or errno.EIO, error.strerror or str(error), unable) from None
        raise OSError(errno.ETIMEDOUT, f"node {self.node} didn't store the record within {self._timeout_s:g} s")


def _unable(new: Membership, failures: Mapping[str, OSError]) -> dict[str, OSError]:
    """Nodes whose legs are in sync by the record, and can't store it."""
    return {node: failures[node] for node in in_sync_nodes(new) & set(failures) if failures[node].errno in UNABLE}


def judge_successor(new: Membership, expected: Membership) -> None:
    """Raises OSError EINVAL for a record that must not follow `expected`."""
    if new.mirror != expected.mirror or not new.descends_from(expected) or new.place <= expected.place:
        raise OSError(errno.EINVAL, f"record {new.place} isn't a successor of {expected.place}")
    if not in_sync_nodes(new):
        raise OSError(errno.EINVAL, NO_TERRACE_LEG)
    if new.forced == "no" and not new.in_sync & expected.in_sync & expected.terrace_ids:
        # Else a candidate that knows only the older record would find none of the legs that have the newer one.
        raise OSError(errno.EINVAL, "a record must keep at least one leg in sync that was, NBD servers not counted")


async def ask(
    nodes: Sequence[str],
    question: Callable[[str], Awaitable[T]],
    enough: Callable[[Mapping[str, T]], bool],
    *,
    timeout_s: float,
    needed: frozenset[str] = frozenset(),
    grace_s: float = 0.05,
) -> tuple[dict[str, T], dict[str, OSError]]:
    """Ask all at once, again after errors that aren't an answer, until enough have answered or the time is up.

    Then the others have `grace_s` more, so that those that are well hear it too. An error that is an answer, of a node
    that is needed, ends it at once.
    """
    answers: dict[str, T] = {}
    failures: dict[str, OSError] = {}

    async def one(node: str, stop: trio.CancelScope) -> None:
        pause_s = 0.05
        while True:
            try:
                answers[node] = await question(node)
            except OSError as error:
                failures[node] = error
                if error.errno in DECIDED | {errno.ENOENT}:
                    if node in needed:
                        stop.cancel()
                    return
            else:
                failures.pop(node, None)
                if enough(answers):
                    stop.deadline = min(stop.deadline, trio.current_time() + grace_s)
                return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)

    with trio.move_on_after(grace_s if enough(answers) else timeout_s) as stop:
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(one, node, stop)
    for node in nodes:
        if node not in answers:
            failures.setdefault(node, OSError(errno.ETIMEDOUT, f"node {node} hasn't answered within {timeout_s:g} s"))
    return answers, failures


def _told(failures: Mapping[str, OSError]) -> str:
    return "; ".join(f"{node}: {error.strerror}" for node, error in sorted(failures.items()))
