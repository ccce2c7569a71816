"""This node's part in a mirror as its primary: proving that it may be, serving, and how that ends.

A `MirrorPart` has one task (`run`), which is in one of two states: nothing is wanted of it, or this node is primary,
from the proof that it may be (`replication.promotion`) to the mirror's end. The volume is exported as `ServedMirror` in
that time, and not at all otherwise. What ends it: a demotion, a later term of another node, and `close`.

There are two kinds, and all that they differ in is below "what a node has of a mirror": `terrace.localmirror` has a leg
in a volume of a pool here, `terrace.diskless` has none, and so only legs on other nodes.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import logging
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final, Protocol, cast

import trio

from replication.arbiter import FORGOTTEN
from replication.cluster import ClusterStore, Voter
from replication.lease import PrimaryLease
from replication.leg import Extents, Leg, LegStore
from replication.lineage import are_apart, both_histories, how_to_discard
from replication.link import RemoteLeg, open_remote_leg
from replication.localleg import LocalLeg
from replication.members import LegFacts
from replication.membership import LegInfo, Membership, Term
from replication.mirror import Mirror
from replication.nbdleg import NbdSite, is_fenced, is_outside, unfenced
from replication.promotion import Forced, Promote, promote
from replication.site import MirrorSettings
from replication.voters import KeptVoter, in_sync_nodes, rule_of
from replication.wire import LegOption
from terrace.arbiter import Arbiter, HeldLease
from terrace.exports import StoodFor
from terrace.mirrorevents import Changes, MirrorEvents
from terrace.peers import Peers, Socket
from tiers.changes import ChangedExtents

log = logging.getLogger("terraced")

WAIT_S: Final = 8.0
"""A client that asks for a mirror that is just being started waits so long: less than its handshake may take."""
RETRY_S: Final = 2.0
ASK_S: Final = 2.0
"""So long other nodes have to answer, unless the mirror's own timeout is shorter."""
WATCH_S: Final = 0.25
HEARTBEATS: Final = 4
"""So many in the time of one lease."""

Tell = Callable[[str, str, str], None]


class ServedMirror(Mirror):
    """The export: a `Mirror` that knows the volume that it stands for."""

    mirrored_volume: StoodFor


class Surroundings(Protocol):
    """What a `MirrorPart` needs of the node."""

    peers: Peers
    own_voter: KeptVoter
    boot: str
    tell: Tell
    keep_before_resync: bool
    """Whether a leg keeps its last consistent state while it is resynced."""

    def voter(self, node: str) -> Voter:
        """This node's, or a peer's."""

    arbiter: Arbiter

    def cluster(self, membership: Membership) -> ClusterStore:
        """Where the mirror's record is made to count."""

    def disconnect(self, export: str) -> int:
        """Drop the clients of an export that is none any more; how many there were."""


class MirrorPart(abc.ABC):
    """See the module. `run` has to be run."""

    def __init__(self, node: Surroundings, *, is_new: bool = False) -> None:
        """`is_new`: this node has just written the first record."""
        self.mirror: ServedMirror | None = None
        """While this node is primary, from before it serves."""
        self.starting = False
        """It is being found out whether this node may be primary."""
        self.problem: OSError | None = None
        """Why it isn't, where it should be."""
        self._refused: OSError | None = None
        """What it was refused with when it was to be primary last."""
        self._refused_by: Membership | None = None
        """The record that was here then."""
        self.compared_in_full: set[str] = set()
        """Legs, by id, whose writes were discarded: what differs there is known to nobody."""
        self.nbd_sites: dict[str, NbdSite] = {}
        """By the legs' ids. Each remembers what this process has sent to its server."""
        self._servers: trio.Nursery
        """Of connections to NBD servers, which may outlive the term in which they were made (`replication.nbdleg`)."""
        self._fenced_nodes: dict[str, Term] = {}
        """Nodes that are known not to write to NBD servers any more, and the term that they have promised."""
        self._connected: dict[str, RemoteLeg] = {}
        """By id, the last one of each: the mirror asks for facts of a leg before it takes it."""
        self._node = node
        self._is_new = is_new
        self._settled = trio.Event()
        """Neither starting nor about to."""
        self._wanted = trio.Event()
        self._force = False
        self._scope: trio.CancelScope | None = None
        self._closing = trio.Event()
        self._gone = trio.Event()
        self._lease: PrimaryLease
        self._leased: Membership
        """The record that the lease was judged by."""
        self._lease_voters: tuple[str, ...] = ()
        self._held: HeldLease | None = None
        """With an arbiter, in place of the other one."""
        self._lapsed_at: float | None = None
        """By trio's clock, since when requests wait for a lease."""
        self._needs_lease = False
        self._stirred = trio.Event()
        """Replaced when this node has ceased to be primary."""
        self._events = MirrorEvents(node.peers.node)
        self._settled.set()

    def _begin_as_before(self) -> None:
        """Where this node is the primary by all that is known here, it goes on. Once, when all else is there."""
        self.problem = self._left_behind()
        if self.is_named_primary and self.problem is None:
            self.starting = True
            self._wanted.set()
            self._settled = trio.Event()

    # -- what a node has of a mirror -----------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """POOL/VOL."""

    @property
    def pool_name(self) -> str:
        """POOL."""
        return self.name.partition("/")[0]

    @property
    def short_name(self) -> str:
        """VOL."""
        return self.name.partition("/")[2]

    @property
    @abc.abstractmethod
    def policy_name(self) -> str:
        """The volume's policy, which new legs get too where it is known."""

    @property
    @abc.abstractmethod
    def stood_for(self) -> StoodFor:
        """What counts the clients."""

    @property
    @abc.abstractmethod
    def size_bytes(self) -> int:
        """The volume's."""

    @property
    @abc.abstractmethod
    def store(self) -> LegStore | None:
        """Where the leg here is, if there is one."""

    @property
    @abc.abstractmethod
    def me(self) -> str:
        """The id of the leg here; empty if there is none."""

    @property
    @abc.abstractmethod
    def accepted(self) -> Membership | None:
        """The newest record that is durable here."""

    @property
    @abc.abstractmethod
    def intact(self) -> bool:
        """The leg here can't have lost anything; see `LegFacts`."""

    @property
    @abc.abstractmethod
    def rotational(self) -> bool:
        """As clients are told."""

    @abc.abstractmethod
    async def _take_part(self) -> None:
        """Before this node serves in a new term. Raises OSError."""

    @abc.abstractmethod
    async def _open_here(self, nursery: trio.Nursery, info: LegInfo, membership: Membership) -> Leg:
        """The leg here, for this node as primary. Raises OSError."""

    @abc.abstractmethod
    async def _settle_as_replica(self) -> None:
        """This node has ceased to be primary, and nothing of that is under way any more."""

    @abc.abstractmethod
    async def _leave(self) -> None:
        """The end of it all: what is here is clean, and not written to from then on. Raises OSError."""

    async def _look_out(self, mirror: ServedMirror) -> None:
        """A task while this node is primary, for who wouldn't learn otherwise that another one is."""
        await trio.lowlevel.checkpoint()

    async def _beside(self) -> None:
        """A task for as long as `run`."""
        await trio.lowlevel.checkpoint()

    @property
    def superseded(self) -> Membership | None:
        """A record that this node has heard of, and that supersedes its own."""
        return None

    @property
    def _leg_here(self) -> LocalLeg | None:
        """The leg here, while it is open for this node as primary."""
        return None

    def kept_state(self) -> str | None:
        """POOL/VOL@SNAP of the last consistent state of a leg that is being resynced."""
        return None

    def way_out(self) -> str:
        """Behind a refusal to promote: what is left of a leg that was being resynced. Empty where nothing is."""
        kept = self.kept_state()
        if kept is None:
            return ""
        return (
            f"; its last consistent state is kept as {kept}: `terrace volume clone {kept} {self.name}-rescued` makes a "
            "volume of it"
        )

    _settings = MirrorSettings()
    """Of its mirrors."""
    _insists = False
    """It goes on trying also where the term that it has begun has failed before anything was served."""

    def _link_timeout_s(self, membership: Membership) -> float:
        """So long a leg on another node may be lost before it has failed for good."""
        return membership.options.timeout_s

    # -- what is known -------------------------------------------------------------------------------------------

    @property
    def membership(self) -> Membership:
        """The newest record that is known here. Raises OSError ENODATA for a leg that was never given one."""
        if self.mirror is not None:
            return self.mirror.membership
        accepted = self.accepted
        if accepted is None:
            raise OSError(errno.ENODATA, f"{self.name} is a leg of a mirror that it knows nothing of")
        return accepted

    @property
    def is_named_primary(self) -> bool:
        """By the newest record that is known here."""
        accepted = self.accepted
        return accepted is not None and accepted.primary == self._node.peers.node

    @property
    def is_primary(self) -> bool:
        """This node serves it, or is about to."""
        return self.mirror is not None

    @property
    def is_left_behind(self) -> bool:
        """It is the other side of a split brain, and doesn't go on by itself; `problem` says it in a sentence."""
        return self.mirror is None and self._left_behind() is not None

    @property
    def serves(self) -> bool:
        """Clients may have it now."""
        return self.mirror is not None and self.mirror.started.is_set() and not self.mirror.ended.is_set()

    async def serving(self) -> ServedMirror:
        """The export, for a client. Waits while it is started. Raises OSError EBUSY with who has it."""
        with trio.move_on_after(WAIT_S):
            while self.mirror is not None or self.starting:
                if self.mirror is not None and self.mirror.started.is_set():
                    return self.mirror
                await trio.sleep(0.02)
        raise self.refusal()

    @property
    def problem_now(self) -> OSError | None:
        """Why it can't be served here; not why it couldn't be before there was a later record here."""
        accepted, before = self.accepted, self._refused_by
        is_past = (
            self.problem is self._refused and accepted is not None and (before is None or accepted.place > before.place)
        )
        return None if is_past and not self.is_left_behind else self.problem

    def refusal(self) -> OSError:
        """Why clients may not have it here."""
        if (problem := self.problem_now) is not None:
            return OSError(errno.EBUSY, f"{self.name} can't be served: {problem.strerror}")
        accepted = self.accepted
        primary = accepted.primary if accepted is not None else None
        if primary is None:
            return OSError(
                errno.EBUSY,
                f"{self.name} is a leg of a mirror that has no primary now: `terrace volume mirror promote "
                f"{self.name}` makes this node the primary",
            )
        if primary == self._node.peers.node:
            return OSError(errno.EBUSY, f"{self.name} is a mirror that is being started; try again in a moment")
        return OSError(
            errno.EBUSY,
            f"{self.name} is a leg of a mirror whose primary is node {primary}: use it there, or promote it here with "
            f"`terrace volume mirror promote {self.name}` once it is demoted there",
        )

    # -- becoming primary, and ceasing to be ---------------------------------------------------------------------

    async def promote(self, *, force: bool = False) -> None:
        """Become primary. Idempotent. Raises OSError with whom it would have to hear."""
        if self.serves:
            return
        if self._closing.is_set() or self._gone.is_set():
            raise self.problem or OSError(errno.ESHUTDOWN, f"{self.name} is being closed here; try again in a moment")
        if self._wanted.is_set():
            self._force = self._force or force
            if force and self._settled.is_set():
                self._settled = trio.Event()  # that it can't be without force is known; what comes of this isn't yet
            if self._scope is not None and force:
                self._scope.cancel()  # it may have waited for those that won't come
        else:
            self._force, self.problem = force, None
            self.starting = True
            self._settled = trio.Event()
            self._wanted.set()
        await self._settled.wait()
        if not self.serves:
            raise self.problem or self.refusal()

    async def begin_anew(self) -> None:
        """End as primary, and be it again in a later term, whatever others have: by an operator's order."""
        if self._scope is not None:
            self._force = True
            mirror = self.mirror
            self._settled = trio.Event()  # else `promote` takes the term that ends for the one that is to begin
            self._scope.cancel()
            while self.mirror is mirror and mirror is not None:
                await self._stirred.wait()
        await self.promote(force=True)

    async def demote(self, token: str | None) -> None:
        """Cease to be primary, cleanly; on return the leg is one as any other. Idempotent."""
        mirror = self.mirror
        if mirror is None:
            return
        await mirror.demote(token)
        while self.mirror is mirror:
            await self._stirred.wait()

    async def close(self) -> None:
        """End, and be clean; the volume is not written to from then on. Idempotent."""
        if self._closing.is_set():
            await self._gone.wait()
            return
        self._closing.set()
        mirror = self.mirror
        try:
            if mirror is not None and mirror.started.is_set():
                with trio.move_on_after(mirror.membership.options.timeout_s):
                    await mirror.stop()
        except OSError as error:
            log.warning("%s: not all is durable everywhere: %s", self.name, error.strerror)
        finally:
            # Also where this is cancelled: `run` has to end, since others wait for that.
            self._settled.set()
            self._wanted.set()
            if self._scope is not None:
                self._scope.cancel()
        await self._gone.wait()

    async def run(self) -> None:
        """The task: primary whenever that is wanted, until `close`."""
        if self.problem is not None and self.is_left_behind:
            self._node.tell("splitbrain", self.name, f"{self.name} can't be served here: {self.problem.strerror}")
        try:
            async with trio.open_nursery() as self._servers:
                self._servers.start_soon(self._beside)
                while not self._closing.is_set():
                    await self._wanted.wait()
                    if self._closing.is_set():
                        break
                    await self._be_primary()
                self._servers.cancel_scope.cancel()
            try:
                await self._leave()
            except OSError as error:
                log.warning("%s: can't be declared clean: %s", self.name, error.strerror)
        finally:
            self.mirror, self.starting = None, False
            self._settled.set()
            self._gone.set()

    async def _be_primary(self) -> None:
        """Prove that this node may be, and serve until that ends."""
        restarts = self.is_named_primary
        force, self._force = self._force, False
        with trio.CancelScope() as self._scope:
            try:
                membership = await self._proven(force=force)
                self.problem = None
                await self._serve(membership)
            except* OSError as group:
                self.problem = self._refused = _first(group)
                self._refused_by = self.accepted
        self._scope = None
        mirror, self.mirror = self.mirror, None
        self._stirred.set()
        self._stirred = trio.Event()
        if mirror is not None:
            dropped = self._node.disconnect(self.name)
            log.info("%s: no longer served from here; %d clients were disconnected", self.name, dropped)
        self.starting = False
        if self._closing.is_set():
            return
        await self._settle_as_replica()
        if self._force:
            return  # a forced promotion has come while an ordinary one waited
        still = self.is_named_primary
        if restarts and (left_behind := self._left_behind()) is not None:
            if self.problem is None or self.problem.strerror != left_behind.strerror:
                self._node.tell("splitbrain", self.name, f"{self.name} can't be served here: {left_behind.strerror}")
            self.problem, still = left_behind, False
        if mirror is not None and mirror.records.renewal is not None and self.problem is None:
            # It has asked for a later term, and has come to neither that nor back to its own: so it goes on trying.
            self.problem, restarts = mirror.end, True
        insists = restarts or self._insists or (self.problem is not None and self.problem.errno == FORGOTTEN)
        if self.problem is not None and insists and still:
            # It is the primary by all that is known, and only lacks a proof: others may come.
            self._tell_problem(self.problem)
            self._settled.set()
            with trio.move_on_after(RETRY_S) as self._scope:
                await trio.sleep_forever()
            self._scope = None
            return
        self._wanted = trio.Event()
        self._settled.set()

    def _left_behind(self) -> OSError | None:
        """Why this node doesn't go on by itself though it was primary by its own record: the other side of a split
        brain has been heard of. Only an operator decides that."""
        accepted, other = self.accepted, self.superseded
        if accepted is None or other is None:
            return None
        there = other.legs_on(other.primary) if other.primary is not None else other.legs
        if not are_apart(accepted, self.me, other, there[0].id if there else ""):
            return None
        me = self._node.peers.node
        sides = both_histories(other, accepted, f"node {other.primary}", f"node {me}")
        return OSError(
            errno.EUCLEAN,
            f"split brain: {sides}; it doesn't go on here by itself any more. Decide whose writes are lost: "
            f"{how_to_discard(other, me)}; `terrace volume mirror promote {self.name} --force` here gives up theirs",
        )

    async def _proven(self, *, force: bool, serving: Term | None = None) -> Membership:
        """The record with which this node is primary, which counts. Raises OSError.

        `serving`: it serves in that term already, and goes on by itself; see `promote`.
        """
        membership = self.membership
        is_new, self._is_new = self._is_new, False
        own = is_new and membership.primary == self._node.peers.node and not force
        if own and await self._is_created(membership):
            # Nobody else knows of it. Only this once: begun again in the same term, it would write other records with
            # the places of those that it may have sent to new legs before.
            return membership
        timeout_s = membership.options.timeout_s
        decision = await promote(
            self._node.peers.node,
            membership.mirror,
            tuple(dict.fromkeys((self._node.peers.node, *nodes_of_mirror(membership)))),
            self._node.voter,
            self._node.cluster(membership),
            arbiter=membership.options.arbiter == "etcd",
            force=force,
            patience_s=timeout_s if serving is None and membership.primary == self._node.peers.node else 0.0,
            timeout_s=min(ASK_S, timeout_s),
            heard_of=self._node.own_voter.heard_of,
            own=serving,
        )
        if not isinstance(decision, Promote):
            raise OSError(errno.EBUSY, decision.sentence + self.way_out())
        if isinstance(decision, Forced):
            self._node.tell("mirror", self.name, f"{self.name} was promoted by force. {decision.may_lose}")
        return decision.membership

    def _renews(self) -> bool:
        """Whether it begins a later term by itself, for a leg that has promised one; see `replication.laterterm`.

        Not without a leg here: there the promise of this node ends what it serves.
        """
        return self.store is not None

    async def _in_later_term(self) -> Membership:
        """For a mirror that is served from here already. Raises OSError."""
        term = self.membership.term
        async with self._held.changing if self._held is not None else contextlib.nullcontext():
            record = await self._proven(force=False, serving=term)
        # Nobody else was primary in between: who was known to write to NBD servers no more does so still.
        self._fenced_nodes = {node: record.term for node, known in self._fenced_nodes.items() if known == term}
        return record

    async def _is_created(self, first: Membership) -> bool:
        """The arbiter, if there is one, knows a mirror that is just made. False: it knows a later record."""
        if first.options.arbiter == "legs":
            return True
        try:
            await self._node.cluster(first).create(first)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    async def _serve(self, membership: Membership) -> None:
        """As primary of that term, until it ends."""
        try:
            await self._take_part()
        except OSError as error:
            if self.me in membership.in_sync:
                raise
            log.warning("%s: served without the leg here, which can store nothing: %s", self.name, error.strerror)
        async with trio.open_nursery() as nursery:
            self._lease = PrimaryLease(membership.options.lease_s, membership.voters)
            self._lease_voters = membership.voters
            self._leased, self._needs_lease = membership, rule_of(membership) != "all"
            self._held = None
            if membership.options.arbiter == "etcd":
                self._held = self._node.arbiter.held(membership.mirror, membership.options.lease_s)
            self._lapsed_at = None
            nursery.start_soon(self._heartbeats)
            if (membership.term.number, membership.epoch) != (1, 0):
                # An earlier process may have written there, or another node that was primary since this one was.
                for info in membership.legs:
                    if info.kind == "nbd":
                        self.nbd_sites.setdefault(info.id, NbdSite(info, _no_extents)).may_owe = True
            mirror = ServedMirror(
                self.name,
                membership,
                self._node.cluster(membership),
                partial(self._connect, nursery),
                store=self.store,
                facts=self._facts,
                may_serve=self._may_serve,
                lease_is_refused=lambda: self._held is None and self._needs_lease and self._lease.is_refused,
                until_may_serve=self._until_may_serve,
                lapsed=lambda: self.lease_over,
                prove=self._in_later_term if self._renews() else None,
                description=f"mirror {membership.mirror[:8]}",
                rotational=self.rotational,
                settings=self._settings,
            )
            mirror.mirrored_volume = self.stood_for
            self.mirror = mirror
            nursery.start_soon(self._watch, mirror)
            nursery.start_soon(self._look_out, mirror)
            try:
                async with trio.open_nursery() as while_serving:
                    if self._held is not None:
                        while_serving.start_soon(self._held.keep, lambda: mirror.membership, mirror.fence)
                    await mirror.run()
                    while_serving.cancel_scope.cancel()
            finally:
                if mirror.started.is_set():  # `_watch` may have looked just before
                    self._tell(self._events.looked(self.name, mirror.status(), trio.current_time()))
                # Nobody takes it again meanwhile: a successor would have to wait for it to end.
                if self._held is not None:
                    await self._held.release()
            nursery.cancel_scope.cancel()

    def _may_serve(self) -> bool:
        """Asked for each request. Where a majority decides, only while a majority has heard this node lately."""
        if self._held is not None:
            return self._held.may_serve(self._nodes_in_sync)
        if self.mirror is not None and self.mirror.membership is not self._leased:
            membership = self._leased = self.mirror.membership
            self._needs_lease = rule_of(membership) != "all"
            if set(membership.voters) != set(self._lease_voters):
                self._lease_voters = membership.voters
                self._lease = PrimaryLease(membership.options.lease_s, membership.voters)
        return not self._needs_lease or self._lease.may_serve

    def _nodes_in_sync(self) -> frozenset[str]:
        """By the record, or one that is being written."""
        assert self.mirror is not None
        records = (self.mirror.membership, *self.mirror.records.attempts)
        return frozenset().union(*(in_sync_nodes(record) for record in records))

    @property
    def lease_over(self) -> str | None:
        """Why nothing is answered though this node is primary: its lease is over. None: it isn't, or needs none."""
        if not self.serves or self._may_serve():
            return None
        if self._held is None:
            when = "lately" if self._lease.has_begun else "yet"
            return f"a majority of the voters has not answered this node {when}"
        problem = self._held.problem
        why = f": {problem.strerror}" if problem is not None else ""
        return f"neither etcd nor all nodes with a leg in sync have answered this node lately{why}"

    async def _until_may_serve(self) -> None:
        """One request waits a moment. Raises OSError EIO where they are to fail, and the lease is over for good."""
        clock = trio.current_time
        if self._may_serve():
            return
        assert self.mirror is not None
        options = self.mirror.membership.options
        self._lapsed_at = self._lapsed_at if self._lapsed_at is not None else clock()
        if options.below_quorum == "fail" and clock() - self._lapsed_at > options.lease_s:
            raise OSError(errno.EIO, f"{self.name}: below quorum: {self.lease_over}")
        await trio.sleep(0.01)

    async def _beat(self) -> None:
        lease, held, membership = self._lease, self._held, self.membership
        begun = lease.begin()

        async def one(node: str) -> None:
            try:
                await self._node.voter(node).heartbeat(membership.mirror, membership.term)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    lease.refused(node)
                return
            lease.answered(node, begun)
            if held is not None:
                held.answered(node, begun)

        with trio.move_on_after(membership.options.lease_s):
            async with trio.open_nursery() as nursery:
                for node in membership.voters:
                    nursery.start_soon(one, node)

    async def _heartbeats(self) -> None:
        """A round begins on time though one before it may not have ended: a voter that is away delays nobody.

        With fewer than three voters nobody's lease counts; the rounds tell the others all the same that this node is
        alive, so that none of them is promoted by mistake.
        """
        async with trio.open_nursery() as nursery:
            while True:
                if self._may_serve():  # takes a record with other voters in
                    self._lapsed_at = None
                nursery.start_soon(self._beat)
                await trio.sleep(self.membership.options.lease_s / HEARTBEATS)

    # -- legs ----------------------------------------------------------------------------------------------------

    async def _connect(self, nursery: trio.Nursery, info: LegInfo, membership: Membership) -> Leg:
        if info.id == self.me:
            return await self._open_here(nursery, info, membership)
        if info.kind == "nbd":
            return await self._connect_nbd(info, membership)
        peers = self._node.peers

        async def connect() -> tuple[Socket, bytes]:
            session = secrets.token_hex(8)
            wanted = LegOption(peers.node, membership.mirror, info.id, membership.term, session)
            return await peers.connect(info.node, wanted)

        leg: RemoteLeg | None = None
        bound_s = max(membership.options.timeout_s, self._settings.first_leg_s)
        try:
            with trio.move_on_after(bound_s):
                leg = await open_remote_leg(
                    *(nursery, connect, info, membership),
                    timeout_s=self._link_timeout_s(membership),
                    decode_extents=ChangedExtents.decode,
                    traffic=peers.traffic.get(info.node),
                )
        except OSError as error:
            split = await self._said_instead(info, membership) if error.errno == errno.ESTALE else None
            raise split or error from None
        if leg is None:
            raise OSError(
                errno.ETIMEDOUT,
                f"{info.export} on {info.node} has not answered within {bound_s:g} s",
            )
        split = self._judge(info, leg.hello.accepted, membership)
        if split is not None:
            leg.close()
            raise split
        self._connected[info.id] = leg
        return leg

    async def _connect_nbd(self, info: LegInfo, membership: Membership) -> Leg:
        await self._require_fenced(info, membership)
        site = self.nbd_sites.get(info.id)
        if site is None:
            # A leg that was removed may have been on this server, whatever its URI was.
            may_owe = any(not membership.has(leg_id) for leg_id in self.nbd_sites)
            site = self.nbd_sites[info.id] = NbdSite(info, _no_extents, may_owe=may_owe)
        return await site.open(
            *(self._servers, membership.size_bytes),
            timeout_s=membership.options.timeout_s,
            ahead=self._leg_here,
        )

    async def _require_fenced(self, info: LegInfo, membership: Membership) -> None:
        """No node that was primary before writes to the server any more. Raises OSError EBUSY with whom to hear."""
        for node in unfenced(membership, self._node.peers.node):
            if self._fenced_nodes.get(node) != membership.term:
                has_let_go, promised = False, None
                try:
                    promised = (await self._node.voter(node).state(membership.mirror)).promised
                except OSError as error:
                    has_let_go = error.errno == errno.ENOENT and is_outside(membership, node)
                    if not has_let_go:
                        raise OSError(
                            errno.EBUSY,
                            f"node {node}, which was primary before, may still write to {info.export}: the leg stays "
                            f"out until that node is heard ({error.strerror}), or removed from the mirror because it "
                            f"is gone: `terrace volume mirror remove {self.name} {node}`",
                        ) from None
                if not has_let_go and not is_fenced(membership, node, promised):
                    raise OSError(errno.EBUSY, f"node {node} hasn't promised yet to write to {info.export} no more")
                # What it sent last the server has, or will have by then.
                await trio.sleep(membership.options.timeout_s)
                self._fenced_nodes[node] = membership.term

    def is_gone(self, node: str) -> None:
        """An operator says so of a node that was primary before: NBD servers needn't wait for it in this term."""
        self._fenced_nodes[node] = self.membership.term

    async def _said_instead(self, info: LegInfo, membership: Membership) -> OSError | None:
        """A leg that takes nothing of our term says nothing of what it has; its node's voter does.

        Two sides of a split brain may have begun terms of one number, and neither takes anything of the other's.
        """
        try:
            state = await self._node.voter(info.node).state(membership.mirror)
        except OSError:
            return None
        return self._judge(info, state.accepted, membership)

    def _judge(self, info: LegInfo, theirs: Membership | None, membership: Membership) -> OSError | None:
        """EUCLEAN for a leg that has gone its own way."""
        if theirs is None or not are_apart(membership, self.me, theirs, info.id):
            return None
        sides = both_histories(membership, theirs, f"node {self._node.peers.node}", f"node {info.node}")
        return OSError(
            errno.EUCLEAN,
            f"split brain: {sides}; decide whose writes are lost: {how_to_discard(membership, info.node)}",
        )

    async def _facts(self, info: LegInfo, membership: Membership) -> LegFacts:
        await trio.lowlevel.checkpoint()
        if info.kind == "nbd":
            was_resized = info.id in self.nbd_sites and self.nbd_sites[info.id].was_resized
            return LegFacts(known=info.id not in self.compared_in_full and not was_resized)
        leg = self._connected.get(info.id)
        if info.id == self.me or leg is None:
            return LegFacts(intact=self.intact)
        theirs = leg.hello.accepted
        known = theirs is not None and theirs.has(info.id) and info.id not in self.compared_in_full
        return LegFacts(intact=leg.hello.intact, known=known)

    # -- what is told ----------------------------------------------------------------------------------------------

    async def _watch(self, mirror: ServedMirror) -> None:
        """Tell what changes, once each."""
        await mirror.started.wait()
        self.starting = False
        self._settled.set()
        self._tell(self._events.begun(self.name, mirror.status(), trio.current_time()))
        while True:
            with trio.move_on_after(WATCH_S):
                await mirror.changed()
            self._tell(self._events.looked(self.name, mirror.status(), trio.current_time()))
            await trio.sleep(0.02)

    def _tell_problem(self, problem: OSError) -> None:
        for kind, text in self._events.problem(self.name, problem.strerror or str(problem)):
            self._node.tell(kind, self.name, text)

    def _tell(self, changes: Changes) -> None:
        for kind, text in changes.events:
            self._node.tell(kind, self.name, text)
        for leg in changes.in_sync:
            self.compared_in_full.discard(leg)
            if leg in self.nbd_sites:
                self.nbd_sites[leg].in_sync()


def _no_extents() -> Extents:
    return cast(Extents, ChangedExtents())


def boot_id() -> str:
    """Of the kernel that runs now: another one after each start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _first(group: BaseExceptionGroup[OSError]) -> OSError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OSError)
    return error


def nodes_of_mirror(membership: Membership) -> tuple[str, ...]:
    """All that may know of it; its primary may have neither a leg nor a say."""
    primary = (membership.primary,) if membership.primary is not None else ()
    return tuple(dict.fromkeys((*membership.voters, *nodes_of(membership.legs), *primary)))


def nodes_of(legs: Iterable[LegInfo]) -> tuple[str, ...]:
    """The voters that legs make: each node with a Terrace leg, once."""
    return tuple(dict.fromkeys(leg.node for leg in legs if leg.kind == "terrace"))
