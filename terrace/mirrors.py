"""The mirrors of this node: which volumes are legs of one, and what other nodes may ask about them.

A volume that has a record (`Volume.mirror_record`) is a leg. When its pool is opened, it becomes a `LocalMirror`, and
when the pool is about to be closed that ends cleanly, before the engine flushes for the last time. What NBD clients,
files and devices get under the name of such a volume is decided here too: the mirror where this node is primary, and a
refusal that names the primary everywhere else. The engine itself refuses to resize, delete or roll back a volume that
has a record, except for us. Mirrors that this node serves without a leg are found in `terrace.disklessmirrors`.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import trio

from replication.cluster import ClusterStore, Voter, VoterState
from replication.explain import Explanation
from replication.keeper import LegKeeper, LegRecord
from replication.leg import LegState, MirrorState
from replication.members import MirrorStatus
from replication.membership import LegInfo, Membership, decode, encode
from replication.orders import Known, Order, judge_deletion, judge_discard, judge_order
from replication.voters import KeptVoter, LegsCluster, RemoteVoter
from replication.voters import handlers as voter_handlers
from replication.wire import LegOption
from terrace.apikit import plain
from terrace.arbiter import UNCONFIGURED, Arbiter
from terrace.config import EtcdConfig
from terrace.diskless import DisklessMirror
from terrace.disklessmirrors import DisklessMirrors
from terrace.localmirror import LocalMirror
from terrace.mending import LegMender, heal_leg, read_block
from terrace.mirrorwords import (
    explained,
    is_being_made,
    is_left_over,
    known_record,
    map_notice,
    newest_record,
    removed_here,
    writes_fail,
)
from terrace.oneatatime import OneAtATime
from terrace.peers import Handler, Peers, Socket
from terrace.pools import Pools
from terrace.primary import ASK_S, MirrorPart, ServedMirror, boot_id, nodes_of, nodes_of_mirror
from terrace.removedlegs import RemovedLegs
from terrace.tiebreakers import is_called, said_of, votes_of
from tiers import Pool, TierError, Volume

log = logging.getLogger("terraced")

STATUS_S: Final = 4.0
"""So long a primary has to say how its mirror is; it asks the others for that, which takes `ASK_S`."""
_PRIMARYS: Final = ("state", "waiting", "problem", "legs", "term", "epoch", "primary", "token", "voters")
"""What of a mirror's status its primary knows better."""
LEAVE_OUT_S: Final = 1.0
"""So long a record takes that leaves a leg out, as a rule."""
MOST_SNAPSHOTS = 1000
"""So many of a leg's, the newest, are told to another node."""


class PeerCaller:
    """Calls to one peer, on whatever connection there is to it. Implements `replication.voters.Caller`."""

    def __init__(self, peers: Peers, node: str) -> None:
        self._peers = peers
        self._node = node

    async def call(self, method: str, params: dict[str, Any], timeout_s: float = 10.0) -> Any:
        """As `Calls.call`. EHOSTUNREACH for a node that isn't configured: that it knows nothing isn't said by that."""
        if self._node not in self._peers.peers:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EHOSTUNREACH, f"node {self._node} is no peer of this node: write [peers.{self._node}]")
        return await self._peers.call(self._node, method, params, timeout_s)


class Mirrors:
    """All `LocalMirror`s of the open pools. `run` has to be run; implements `terrace.primary.Surroundings`."""

    def __init__(
        self,
        pools: Pools,
        peers: Peers,
        home: Path,
        tell: Callable[[str, str, str], None],
        arbiter: Arbiter | None = None,
        *,
        keep_before_resync: bool = True,
    ) -> None:
        self.pools = pools
        self.arbiter = arbiter or Arbiter(EtcdConfig(), home, peers.node, tell)
        self.peers = peers
        self.tell = tell
        self.boot = boot_id()
        self.keep_before_resync = keep_before_resync
        self.own_voter = KeptVoter(peers.node, home, self._keepers, is_primary=self._is_primary)
        self.removed = RemovedLegs(home)
        self.drop_clients: Callable[[str], int] = lambda export: 0
        self._mirrors: dict[Volume, LocalMirror] = {}
        self._broken: dict[Volume, OSError] = {}
        self._ending = OneAtATime()
        """Of two that end a mirror here at once the first may fail, and begin it again: the second ends that one."""
        self._nursery: trio.Nursery | None = None
        self.diskless = DisklessMirrors(pools, home, self, self._live)
        self._callers = {name: RemoteVoter(name, PeerCaller(peers, name)) for name in peers.peers}

    @property
    def node(self) -> str:
        """This node's name; empty if it has none."""
        return self.peers.node

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """The task: mirrors of all pools that are open, or will be."""
        async with trio.open_nursery() as self._nursery:
            self.pools.watcher = self
            try:
                for pool in self.pools.open_pools():
                    self.opened(pool)
                await self.diskless.start(self._nursery)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self.pools.watcher = None
        raise AssertionError("it sleeps for ever")

    def opened(self, pool: Pool) -> None:
        """A pool was opened: its mirrors begin. Synchronous."""
        for volume in pool.volumes():
            if volume.mirror_record:
                self.adopt(pool, volume)

    def adopt(self, pool: Pool, volume: Volume, *, is_new: bool = False) -> LocalMirror | None:
        """A volume has a record now; `is_new`: the first one of a mirror, of this node alone.

        None if it can't be understood, or this node has no name: then it is closed.
        """
        assert self._nursery is not None
        if volume in self._mirrors:
            return self._mirrors[volume]
        try:
            if not self.node:
                raise OSError(errno.EINVAL, "this node has no name any more: set name under [node] to what it was")
            mirror = LocalMirror(pool, volume, self, is_new=is_new)
        except OSError as error:
            self._broken[volume] = error
            self.tell("mirror", volume.name, f"{volume.name} is a leg of a mirror, and can't be used: {error.strerror}")
            return None
        self._broken.pop(volume, None)
        self._mirrors[volume] = mirror
        self._nursery.start_soon(self._live, mirror)
        return mirror

    async def _live(self, mirror: MirrorPart) -> None:
        try:
            async with trio.open_nursery() as nursery:
                if isinstance(mirror, LocalMirror):
                    await self._live_with_leg(mirror, nursery)
                else:
                    await mirror.run()
                nursery.cancel_scope.cancel()
        except Exception as error:
            log.error("mirror %s failed", mirror.name, exc_info=error)
            self.tell("mirror", mirror.name, f"mirror {mirror.name} failed: {error}; please report it with the log")
            mirror.problem = OSError(errno.EIO, f"internal error: {error}; restart terraced")

    async def _live_with_leg(self, mirror: LocalMirror, nursery: trio.Nursery) -> None:
        mender = LegMender(mirror, self.peers, self.tell)
        mirror.volume.elsewhere = mender
        try:
            nursery.start_soon(_mend, mender)
            await mirror.run()
        finally:
            mirror.volume.elsewhere = None

    async def closing(self, pool: Pool) -> None:
        """A pool is about to be closed: its mirrors end, cleanly."""
        async with trio.open_nursery() as nursery:
            for mirror in [one for one in self._mirrors.values() if one.pool is pool]:
                nursery.start_soon(self.forget, mirror)

    def gone(self, pool: Pool) -> None:
        """A pool has failed. Synchronous: nothing of it can be used any more."""
        for volume in [volume for volume, mirror in self._mirrors.items() if mirror.pool is pool]:
            mirror = self._mirrors.pop(volume)
            if self._nursery is not None:
                self._nursery.start_soon(mirror.close)

    async def giving_up(self, pool: Pool) -> None:
        """A pool that takes no writes is about to be destroyed, with its legs. Raises OSError.

        What others need to go on without them is done before: a primary leaves its own leg out, by a record, and
        promises are kept.
        """
        for mirror in [one for one in self._mirrors.values() if one.pool is pool]:
            if mirror.mirror is not None and mirror.serves:
                await _leave_out(mirror.mirror, mirror.me)
            if mirror.accepted is not None:
                await self.own_voter.retire(mirror.membership)  # before its promise goes with the leg
            self.tell(
                "leg",
                mirror.name,
                f"the leg of {mirror.name} here is given up with pool {pool.name}; at its primary: `terrace volume "
                f"mirror remove {mirror.name} {self.node}`, and `add` when there is a pool for it",
            )

    def patience_s(self) -> float:
        """Within that what clients have under way is acknowledged, though a leg may just have fallen silent."""
        served = [mirror.mirror for mirror in self.all() if mirror.mirror is not None]
        return max((one.membership.options.timeout_s + LEAVE_OUT_S for one in served), default=0.0)

    async def close(self) -> None:
        """All end, cleanly; the pools can be closed then."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.diskless.close)
            for mirror in list(self._mirrors.values()):
                nursery.start_soon(self.forget, mirror)

    async def forget(self, mirror: LocalMirror) -> None:
        """End one, cleanly."""
        await mirror.close()
        if self._mirrors.get(mirror.volume) is mirror:
            del self._mirrors[mirror.volume]

    # -- what there is -------------------------------------------------------------------------------------------

    def all(self) -> list[MirrorPart]:
        """Those with a leg here, and those without, by name."""
        return sorted([*self._mirrors.values(), *self.diskless.all()], key=lambda mirror: mirror.name)

    def of(self, volume: Volume) -> LocalMirror | None:
        """The mirror that a volume is a leg of. Raises OSError EIO for one whose record can't be understood."""
        if volume in self._broken and volume.mirror_record:
            error = self._broken[volume]
            raise TierError(
                errno.EIO,
                f"{volume.name} is a leg of a mirror, and can't be used: {error.strerror}; `terrace volume delete "
                f"{volume.name} --force` deletes the copy here, for good",
            )
        return self._mirrors.get(volume)

    def is_broken(self, volume: Volume) -> bool:
        """Whether it is a leg whose record can't be understood, or not under the name that this node has."""
        return volume in self._broken and bool(volume.mirror_record)

    def one(self, pool_name: str, volume_name: str) -> LocalMirror:
        """Raises ENOENT, with the next step."""
        volume = self.pools.pool(pool_name).volume(volume_name)
        mirror = self.of(volume)
        if mirror is None:
            raise TierError(
                errno.ENOENT,
                f"{volume.name} is not mirrored; `terrace volume mirror add {volume.name} NODE` makes a mirror of it",
            )
        return mirror

    def part(self, pool_name: str, volume_name: str) -> MirrorPart:
        """As `one`, also without a leg here."""
        diskless = self.diskless.at(pool_name, volume_name)
        return diskless if diskless is not None else self.one(pool_name, volume_name)

    def by_leg(self, leg: str) -> LocalMirror | None:
        """The mirror that has this leg here."""
        return next((mirror for mirror in self._mirrors.values() if mirror.me == leg), None)

    def by_mirror(self, mirror_id: str) -> list[LocalMirror]:
        """All legs of a mirror here: one as a rule."""
        return [one for one in self._mirrors.values() if _mirror_of(one) == mirror_id]

    def parts_of(self, mirror_id: str) -> list[MirrorPart]:
        """As `by_mirror`, also without a leg here."""
        diskless = self.diskless.of_mirror(mirror_id)
        return [*self.by_mirror(mirror_id), *([diskless] if diskless is not None else [])]

    async def votes(self) -> list[Membership]:
        """The records of the mirrors that this node is a tie-breaker of, and has no other part in.

        Without those of which all nodes with a leg say that it is gone: this one was away when it was deleted.
        """
        taken = [_mirror_of(one) for one in self._mirrors.values()] + [one.mirror_id for one in self.diskless.all()]
        found = await votes_of(self.own_voter, filter(None, taken))
        there: set[tuple[str, str]] = {(one.mirror, node) for one in found for node in nodes_of(one.legs)}

        async def ask(record: Membership, node: str) -> None:
            if await self._is_gone(node, record):
                there.discard((record.mirror, node))

        with trio.move_on_after(ASK_S):
            async with trio.open_nursery() as nursery:
                for record in found:
                    for node in nodes_of(record.legs):
                        nursery.start_soon(ask, record, node)
        return [one for one in found if any((one.mirror, node) in there for node in nodes_of(one.legs))]

    async def tell_if_vote(self, pool: str, volume: str, error: OSError) -> None:
        """Raises ENOENT where `error` is that there is no such volume, and this node is a tie-breaker of one."""
        if error.errno != errno.ENOENT or any(one.name == f"{pool}/{volume}" for one in self._volumes_of(pool)):
            return
        for record in await self.votes():
            if is_called(record, name := f"{pool}/{volume}"):
                raise TierError(errno.ENOENT, said_of(self.node, name, record)) from None

    def _volumes_of(self, pool: str) -> list[Volume]:
        return [volume for one in self.pools.open_pools() if one.name == pool for volume in one.volumes()]

    def is_exported(self, volume: Volume) -> bool:
        """Whether clients may have it from here."""
        if not volume.mirror_record:
            return True
        mirror = self._mirrors.get(volume)
        return mirror is not None and (mirror.serves or mirror.starting)

    async def serving(self, volume: Volume) -> ServedMirror:
        """What clients get under the name of a volume that is a leg. Raises OSError EBUSY, EIO."""
        mirror = self.of(volume)
        if mirror is None:
            raise TierError(errno.EBUSY, f"{volume.name} is a leg of a mirror that is being started or stopped")
        return await mirror.serving()

    # -- surroundings of each ------------------------------------------------------------------------------------

    def _keepers(self, mirror_id: str) -> Sequence[LegKeeper]:
        return [one.keeper for one in self.by_mirror(mirror_id)]

    def _is_primary(self, mirror_id: str) -> bool:
        return any(one.serves for one in self.parts_of(mirror_id))

    def voter(self, node: str) -> Voter:
        if node == self.node:
            return self.own_voter
        if node not in self._callers:
            return RemoteVoter(node, PeerCaller(self.peers, node))
        return self._callers[node]

    def cluster(self, membership: Membership) -> ClusterStore:
        legs = self._legs_cluster(membership)
        return self.arbiter.cluster(legs) if membership.options.arbiter == "etcd" else legs

    async def forget_at_arbiter(self, membership: Membership) -> list[str]:
        """The mirror is no more, or never came to be; a sentence if something of it is left there."""
        if membership.options.arbiter != "etcd":
            await trio.lowlevel.checkpoint()
            return []
        left = await self.arbiter.forget(membership.mirror, self._legs_cluster(membership))
        return [left] if left is not None else []

    def _legs_cluster(self, membership: Membership) -> LegsCluster:
        async def known(mirror_id: str) -> Sequence[str]:
            await trio.lowlevel.checkpoint()
            return tuple(dict.fromkeys((self.node, *nodes_of_mirror(membership))))

        return LegsCluster(self.node, self.voter, known)

    def disconnect(self, export: str) -> int:
        return self.drop_clients(export)

    # -- what other nodes ask ------------------------------------------------------------------------------------

    def judge(self, option: LegOption) -> str | None:
        """Implements `terrace.peers.Legs`."""
        mirror = self.by_leg(option.leg)
        if mirror is None:
            return (
                f"node {self.node} has no leg {option.leg[:32]} open: its pool isn't (`terrace pool list` there), or "
                f"it was deleted there: then `terrace volume mirror remove` and `add` with {self.node} make another"
            )
        return None

    async def serve(self, sock: Socket, received: bytes, option: LegOption) -> None:
        """Implements `terrace.peers.Legs`."""
        mirror = self.by_leg(option.leg)
        if mirror is None:
            raise OSError(errno.ENOENT, f"the leg {option.leg} is no longer here")
        if option.mirror == _mirror_of(mirror):
            self.own_voter.heard(option.mirror)
        await mirror.replica.serve(sock, received, option, self.peers.traffic.get(option.node))

    def handlers(self) -> Mapping[str, Handler]:
        """What peers may call."""

        async def hello(node: str, params: dict[str, Any]) -> Any:
            await trio.lowlevel.checkpoint()
            return self.peers.hello()

        own = {
            "node.hello": hello,
            "leg.create": self._create_leg,
            "leg.delete": self._delete_leg,
            "leg.discard": self._discard_leg,
            "mirror.forget": self._forget_mirror,
            "leg.block": self._read_block,
            "leg.damaged": self._heal_leg,
            "leg.status": self._tell_leg,
            "leg.may_grow": self._may_grow,
            "leg.gone": self._tell_gone,
            "mirror.find": self._find,
            "mirror.judge": self._judge,
            "mirror.status": self._tell_status,
            "mirror.promote": self._promote,
            "mirror.demote": self._demote,
        }
        voters = {name: partial(_without_node, call) for name, call in voter_handlers(self.own_voter).items()}
        return own | cast("dict[str, Handler]", voters)

    async def _create_leg(self, node: str, params: dict[str, Any]) -> Any:
        """A volume that is a leg. The same again does nothing; returns {export}."""
        membership = _membership(params)
        await self._judge_arbiter(membership)
        leg, name, size = _text(params, "leg"), _text(params, "volume"), params.get("size_bytes")
        if type(size) is not int:
            raise OSError(errno.EINVAL, "leg.create: size_bytes is no whole number")
        there = self.by_leg(leg)
        if there is not None:
            return {"export": there.name}
        pool = self._pool_for(params.get("pool"), _text(params, "like"))
        with self.pools.using(pool.name):
            for volume in [one for one in pool.volumes() if one.short_name == name]:
                await self._take_away(volume, Order(node, membership))
            policy = params.get("policy")
            known = policy if isinstance(policy, str) and policy in self.pools.policies else ""
            record = LegRecord(me=leg, accepted=membership, promised=membership.term, inconsistent=True)
            # Whoever has asked may be gone at any point: a volume that is no leg yet would stay, and nobody knew why.
            with trio.CancelScope(shield=True):
                volume = await self._made_leg(pool, name, size, known, record)
            try:
                await trio.lowlevel.checkpoint_if_cancelled()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await pool.delete_volume(name, mirrored=True)
                raise
            self.adopt(pool, volume)
        self.tell("leg", volume.name, f"{volume.name} was made as a leg of a mirror of node {node}")
        return {"export": volume.name}

    async def _made_leg(self, pool: Pool, name: str, size: int, policy: str, record: LegRecord) -> Volume:
        volume = await pool.create_volume(name, size, policy)
        if volume.open_count:
            # It could be seen while it was made durable. Whoever has it writes to it, and not to a mirror.
            raise OSError(
                errno.EBUSY,
                f"a client of node {self.node} has opened {volume.name} while it was made a leg: disconnect it, "
                "and delete that volume",
            )
        try:
            await pool.set_mirror(volume, record.encode(), {})
        except OSError:
            await pool.delete_volume(name, mirrored=True)
            raise
        return volume

    async def _take_away(self, volume: Volume, order: Order) -> None:
        """A volume that is where a leg is to be made: deleted if it was made as a leg of that mirror, but never became
        one, as that was broken off. Raises EEXIST, EPERM for any other one, which has data, or may have.
        """
        mirror = self._mirrors.get(volume)
        is_other = mirror is not None and _mirror_of(mirror) != order.record.mirror
        if mirror is not None and is_other and await self._is_broken_off(mirror, order.caller):
            await self._delete_broken_off(mirror)
            return
        if mirror is None or is_other or not mirror.keeper.record.inconsistent:
            way_out = "delete or rename that volume first"
            if volume.mirror_record:
                more = " --snapshots" if volume.snapshots else ""
                way_out = (
                    f"if that leg of a mirror is left over, on node {self.node}: terrace volume delete {volume.name} "
                    f"--force{more}"
                )
            raise OSError(
                errno.EEXIST, f"node {self.node} has a volume {volume.name} already: name another pool, or {way_out}"
            )
        judge_deletion(order, self._known(mirror), whole=False)
        if volume.snapshots:
            raise OSError(
                errno.EEXIST,
                f"node {self.node} has a leg {volume.name} of this mirror that is left over, with snapshots: see "
                f"whether they are wanted, then, on that node: terrace volume delete {volume.name} --force --snapshots",
            )
        await self._delete_broken_off(mirror)

    async def _is_broken_off(self, mirror: LocalMirror, node: str) -> bool:
        """Whether it never became a leg, of a mirror that `node` made, and of which that has nothing any more."""
        own = mirror.keeper.record
        if own.accepted is None or not own.inconsistent or own.accepted.has(own.me) or mirror.volume.snapshots:
            return False
        return own.accepted.primary == node and await self._is_gone(node, own.accepted)

    async def _delete_broken_off(self, mirror: LocalMirror) -> None:
        await self.delete_local(mirror)
        self.tell("leg", mirror.name, f"{mirror.name} was deleted: it was made as a leg, but never became one")

    async def _judge_arbiter(self, membership: Membership) -> None:
        """That this node asks the same arbiter as the primary, which has its record there. Raises OSError."""
        if membership.options.arbiter != "etcd":
            return
        try:
            await self.cluster(membership).newest(membership.mirror)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            raise OSError(
                errno.EINVAL,
                f"the etcd that node {self.node} asks knows nothing of this mirror: endpoints and prefix under [etcd] "
                "have to be of the same etcd on all nodes",
            ) from None

    def _pool_for(self, wanted: object, like: str) -> Pool:
        """The pool of that name; else one called as the primary's, or the only one. Raises ENOENT."""
        if isinstance(wanted, str) and wanted:
            return self.pools.pool(wanted)
        pools = {pool.name: pool for pool in self.pools.open_pools()}
        if like in pools:
            return pools[like]
        if len(pools) == 1:
            return next(iter(pools.values()))
        names = ", ".join(pools) or "none that is open"
        raise OSError(errno.ENOENT, f"say which pool of node {self.node} is meant, as {self.node}/POOL: it has {names}")

    async def _delete_leg(self, node: str, params: dict[str, Any]) -> Any:
        """The volume of a leg, by order of its primary. One that is gone already is no error; returns {deleted}.

        Where no leg is named it is one of the mirror that is none any more, by the record of the order.
        """
        leg, order = "" if params.get("leg") == "" else _text(params, "leg"), _membership(params)
        whole, snapshots = params.get("whole") is True, params.get("snapshots") is True
        mirror = self.by_leg(leg)
        if not leg:
            mirror = next((one for one in self.by_mirror(order.mirror) if not order.has(one.me)), None)
        if mirror is None:
            await trio.lowlevel.checkpoint()
            return {"deleted": None}
        name = mirror.name
        judge_deletion(Order(node, order), self._known(mirror), whole=whole)
        if mirror.is_primary:
            raise OSError(errno.EBUSY, f"node {self.node} is primary of {name}: demote it first")
        if mirror.volume_snapshots() and not snapshots:
            raise OSError(errno.ENOTEMPTY, f"{name} has snapshots")
        snapshots = snapshots or bool(mirror.volume.snapshots)  # what a resync keeps is nobody's wish
        if not whole and self.node not in order.voters:
            await self.own_voter.retire(order)  # before its promise goes with the leg
        await self.delete_local(mirror, snapshots=snapshots)
        if whole:
            await self.own_voter.forget(order.mirror)
        self.tell("leg", name, f"{name} was deleted: node {node} has removed this leg from its mirror")
        return {"deleted": name}

    def _known(self, mirror: LocalMirror) -> Known:
        own = mirror.keeper.record
        return Known(f"the leg {mirror.name} on node {self.node}", own.promised, own.accepted, own.me)

    async def _forget_mirror(self, node: str, params: dict[str, Any]) -> Any:
        """By order of its primary: this node, which has no leg, is no tie-breaker any more, or the mirror is gone.

        Returns {forgotten}: whether it had been one.
        """
        order, whole = _membership(params), params.get("whole") is True
        if self.by_mirror(order.mirror):
            raise OSError(errno.EBUSY, f"node {self.node} has a leg of mirror {order.mirror}")
        try:
            said = await self.own_voter.state(order.mirror)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return {"forgotten": False}
            raise
        had_a_say = said.accepted is not None and self.node in said.accepted.voters
        judge_order(Order(node, order), Known(f"the voter on node {self.node}", said.promised, said.accepted))
        if whole:
            await self.own_voter.forget(order.mirror)
        elif self.node not in order.voters:
            await self.own_voter.retire(order)
        return {"forgotten": had_a_say and (whole or self.node not in order.voters)}

    async def delete_local(self, mirror: LocalMirror, *, snapshots: bool = False) -> None:
        """The leg's volume, whatever others may say."""
        async with self._ending.changing(mirror.name):
            try:
                await self._end(mirror)
                if mirror.volume.deleted:  # another one of that name may be there
                    raise TierError(errno.ENOENT, f"{mirror.name} was deleted just now")
                await mirror.pool.delete_volume(mirror.volume.short_name, snapshots=snapshots, mirrored=True)
            except BaseException:
                await self._begin_again(mirror)
                raise

    async def delete_broken(self, pool: Pool, volume: Volume, *, snapshots: bool) -> None:
        """The volume of a leg that `is_broken`: nobody can be told, since it isn't known whose it is."""
        await pool.delete_volume(volume.short_name, snapshots=snapshots, mirrored=True)
        del self._broken[volume]

    async def _begin_again(self, mirror: LocalMirror) -> None:
        """What was to end it has failed, or was cancelled, at any point: the leg must not be dead until a restart."""
        with trio.CancelScope(shield=True):
            await self._end(mirror)
        if mirror.volume.mirror_record and not mirror.volume.deleted:
            self.adopt(mirror.pool, mirror.volume)

    async def _end(self, mirror: LocalMirror) -> None:
        """That one, or the one that stands for its volume by now."""
        await self.forget(self._mirrors.get(mirror.volume, mirror))

    async def dissolve(self, mirror: LocalMirror) -> None:
        """The leg becomes a volume like any other, and its record is gone."""
        async with self._ending.changing(mirror.name):
            try:
                await self._end(mirror)
                await mirror.pool.set_mirror(mirror.volume, b"", {})
            except BaseException:
                if mirror.volume.mirror_record:
                    await self._begin_again(mirror)
                raise

    async def _discard_leg(self, node: str, params: dict[str, Any]) -> Any:
        """An operator has decided at the primary that what was written here, and nowhere else, is given up."""
        membership = _membership(params)
        mirror = self.by_leg(_text(params, "leg"))
        if mirror is None:
            raise OSError(errno.ENOENT, f"node {self.node} has no such leg open")
        judge_discard(Order(node, membership), self._known(mirror))
        await mirror.keeper.prepare(membership.term, node)  # which ends what this node serves of it
        await mirror.keeper.accept(membership, inconsistent=True, discard=True)
        mirror.problem = None
        self.tell("splitbrain", mirror.name, f"what was written to {mirror.name} here is given up, by order of {node}")
        return {}

    async def _read_block(self, node: str, params: dict[str, Any]) -> Any:
        mirror = self.by_leg(_text(params, "leg"))
        if mirror is None:
            raise OSError(errno.ENOENT, f"node {self.node} has no such leg open")
        return await read_block(mirror, params)

    async def _heal_leg(self, node: str, params: dict[str, Any]) -> Any:
        leg = _text(params, "leg")
        for mirror in self.all():
            if mirror.is_primary and mirror.membership.has(leg):
                return await heal_leg(mirror, node, params)
        raise OSError(errno.EAGAIN, f"node {self.node} is not the primary of the leg {leg[:32]}")

    async def _tell_leg(self, node: str, params: dict[str, Any]) -> Any:
        """What the pool here says of a leg's volume and its snapshots, for a primary that has no leg itself."""
        mirror = self.by_leg(_text(params, "leg"))
        if mirror is None:
            raise OSError(errno.ENOENT, f"node {self.node} has no such leg open")
        with self.pools.using(mirror.pool.name) as pool:
            found = next(one for one in plain(pool.status())["volumes"] if one["name"] == mirror.name)
            snapshots = await pool.snapshot_status(mirror.volume.short_name, params.get("snapshot"))
            return {"volume": found, "snapshots": list(map(plain, snapshots[-MOST_SNAPSHOTS:]))}

    def require_growth(self, leg: str, size_bytes: int) -> None:
        """Raises OSError ENOSPC where the pool of a leg here would refuse it that size; ENOENT."""
        mirror = self.by_leg(leg)
        if mirror is None:
            raise OSError(errno.ENOENT, f"node {self.node} has no such leg open")
        mirror.pool.require_growth(mirror.volume.short_name, size_bytes)

    async def _may_grow(self, node: str, params: dict[str, Any]) -> Any:
        size_bytes = params.get("size_bytes")
        if type(size_bytes) is not int:
            raise OSError(errno.EINVAL, "leg.may_grow: size_bytes is no whole number")
        await trio.lowlevel.checkpoint()
        self.require_growth(_text(params, "leg"), size_bytes)
        return {}

    async def _tell_gone(self, node: str, params: dict[str, Any]) -> Any:
        """Whether a pool is open here and no volume is a leg of that mirror; returns {gone}.

        By what the volumes say: a leg may be just ending, and one whose record can't be understood may be of it.
        """
        mirror, name = _text(params, "mirror"), _text(params, "pool")
        await trio.lowlevel.checkpoint()
        is_open = any(pool.name == name for pool in self.pools.open_pools())
        records = [volume.mirror_record for volume in self.pools.open_volumes() if volume.mirror_record]
        return {"gone": is_open and all(_is_of_another(record, mirror) for record in records)}

    async def _find(self, node: str, params: dict[str, Any]) -> Any:
        """The mirror that has a leg here under that name, or that this node is primary of: {name, membership}."""
        pool, _, volume = _text(params, "volume").partition("/")
        await trio.lowlevel.checkpoint()
        part = self.part(pool, volume)
        return {"name": part.name, "membership": json.loads(encode(part.membership))}

    async def _judge(self, node: str, params: dict[str, Any]) -> Any:
        """Whether this node could be the primary, with a leg or without one. Raises OSError where it couldn't."""
        membership = decode(json.dumps(params.get("membership")).encode())
        await trio.lowlevel.checkpoint()
        if not self.by_mirror(membership.mirror):
            self.diskless.judge(_text(params, "volume"), membership, asked_by=node)
        return {}

    async def _tell_status(self, node: str, params: dict[str, Any]) -> Any:
        found = self.parts_of(_text(params, "mirror"))
        await trio.lowlevel.checkpoint()
        if not found:
            raise OSError(errno.ENOENT, f"node {self.node} has no leg of that mirror open")
        status = self.local_status(found[0])
        name = params.get("name")
        if isinstance(name, str) and found[0].serves:
            said = explained(found[0], status, *await self._heard(found[0]), name=name)
            status |= {"headline": said.headline, "text": said.paragraph}
        return status

    async def _promote(self, node: str, params: dict[str, Any]) -> Any:
        """`volume` and `membership`: for a node that has no leg, and so knows neither."""
        found = self.parts_of(_text(params, "mirror"))
        if found:
            await found[0].promote()
            return self.local_status(found[0])
        if params.get("membership") is None:
            raise OSError(errno.ENOENT, f"node {self.node} has no leg of that mirror open")
        membership = decode(json.dumps(params["membership"]).encode())
        if membership.legs_on(self.node):
            raise OSError(
                errno.ENOENT,
                f"node {self.node} doesn't have its leg of that mirror open: `terrace pool list` there says whether "
                "its pool is; else it was deleted there",
            )
        return self.local_status(await self.diskless.promote(_text(params, "volume"), membership, force=False))

    async def _demote(self, node: str, params: dict[str, Any]) -> Any:
        found = self.parts_of(_text(params, "mirror"))
        if not found:
            raise OSError(errno.ENOENT, f"node {self.node} has no leg of that mirror open")
        if found[0].stood_for.open_count:
            raise OSError(errno.EBUSY, f"{found[0].name} is in use on node {self.node}: disconnect its clients first")
        await found[0].demote(node)
        return self.local_status(found[0])

    # -- what people are shown -----------------------------------------------------------------------------------

    def local_status(self, mirror: MirrorPart) -> dict[str, Any]:
        """What is known here, without asking anybody. JSON."""
        found: dict[str, Any] = {
            "volume": mirror.name,
            "node": self.node,
            "size_bytes": mirror.size_bytes,
            "diskless": isinstance(mirror, DisklessMirror),
            "left_over": is_left_over(mirror),
        }
        try:
            membership = known_record(mirror)
        except OSError as error:
            return found | {
                **{
                    "mirror": None,
                    "role": "secondary",
                    "primary": None,
                    "term": None,
                    "epoch": None,
                    "token": None,
                    "voters": [],
                    "arbiter": None,
                },
                **{"state": MirrorState.FAULTED.value, "waiting": None, "problem": error.strerror, "legs": []},
                "writes_fail": False,
                "unreadable_blocks": 0,
            }
        served = mirror.mirror
        status = served.status() if served is not None and mirror.serves else None
        legs = (
            _served_legs(status, mirror.name, self.node)
            if status is not None
            else [self._leg_of_record(mirror, membership, leg) for leg in membership.legs]
        )
        for shown in legs:
            if isinstance(mirror, LocalMirror) and shown["id"] == mirror.me:
                shown["healed_blocks"] += mirror.volume.healed_blocks
        role = "primary" if mirror.serves else "starting" if mirror.starting else "secondary"
        if role == "secondary" and isinstance(mirror, DisklessMirror):
            role = "none"
        state = status.state if status is not None else MirrorState.UNKNOWN
        problem = mirror.problem_now
        if problem is not None and not mirror.serves:
            state = MirrorState.FAULTED
        return found | {
            "mirror": membership.mirror,
            "role": role,
            **_record_status(membership),
            "arbiter": self._arbiter_of(membership),
            "state": state.value,
            "waiting": status.waiting if status is not None else None,
            "writes_fail": status is not None and writes_fail(status),
            "problem": problem.strerror if problem is not None else None,
            "unreadable_blocks": status.unmendable_blocks if status is not None else 0,
            "legs": legs,
        }

    def _arbiter_of(self, membership: Membership) -> dict[str, Any]:
        """Who decides, and whether that one answers this node."""
        if membership.options.arbiter != "etcd":
            return {"kind": "legs", "answers": None, "problem": None}
        status = self.arbiter.status()
        if status is None:
            return {"kind": "etcd", "answers": False, "problem": UNCONFIGURED}
        return {"kind": "etcd", "answers": status["answers"], "problem": status["problem"]}

    def _leg_of_record(self, mirror: MirrorPart, membership: Membership, leg: LegInfo) -> dict[str, Any]:
        """A leg as a node that isn't primary knows it."""
        peer = self.peers.peers.get(leg.node)
        state = LegState.UNPROVEN if leg.id in membership.in_sync else LegState.STALE
        if membership.primary is None and leg.id in membership.in_sync:
            state = LegState.UP_TO_DATE  # cleanly demoted: nothing was written since
        if leg.kind == "nbd":
            return _leg(leg, state.value)  # only a primary talks to it
        if leg.id == mirror.me and isinstance(mirror, LocalMirror) and mirror.keeper.record.inconsistent:
            state = LegState.SYNCING
        elif leg.id == mirror.me and mirror.is_left_behind:
            state = LegState.STALE
        elif leg.node != self.node and (peer is None or peer.calls is None):
            state = LegState.OFFLINE
        return _leg(leg, state.value)

    async def status(self, mirror: MirrorPart) -> dict[str, Any]:
        """As the primary sees it, where that answers; else what is known here, which is said then. JSON."""
        own = self.local_status(mirror)
        if own["role"] in ("primary", "starting") or own["mirror"] is None:
            await trio.lowlevel.checkpoint()
            return own
        voices, unheard, gone = await self._heard(mirror)
        theirs = await self._primarys_status(mirror, voices)
        if theirs is None:
            return self._without_primary(own, mirror, voices, explained(mirror, own, voices, unheard, gone))
        return self._by_primary(own, mirror, theirs)

    async def explained(self, mirror: MirrorPart) -> dict[str, Any]:
        """As `status`, of which it has `volume`, `state` and `legs`, and why in sentences: `text`. JSON."""
        own = self.local_status(mirror)
        if own["mirror"] is None:
            await trio.lowlevel.checkpoint()
            return own | {"text": f"{mirror.name} is {own['state']}: {own['problem']}."}
        voices, unheard, gone = await self._heard(mirror)
        if own["role"] == "starting":
            found_out = f"whether node {self.node} may be its primary is being found out"
            return own | {"text": _sentence(f"{mirror.name} is {own['state']}", found_out)}
        if own["role"] == "primary":
            return own | {"text": explained(mirror, own, voices, unheard).paragraph}
        theirs = await self._primarys_status(mirror, voices, explain=True)
        if theirs is None:
            found = explained(mirror, own, voices, unheard, gone)
            return self._without_primary(own, mirror, voices, found) | {"text": found.paragraph}
        shown = self._by_primary(own, mirror, theirs)
        headline, text = theirs["headline"], theirs["text"]
        if shown["problem"] is not None and not shown["diskless"]:
            # Of the legs that headline says enough: this node's is what is told here.
            return shown | {"text": f"{_sentence(f'{mirror.name} is not served here', shown['problem'])} {headline}"}
        return shown | {"text": text}

    async def _heard(self, mirror: MirrorPart) -> tuple[dict[str, VoterState], dict[str, str], frozenset[str]]:
        """What each node that may know of it says now, and why others don't. All are asked at once, none twice.

        Last those of them that have nothing of it any more, though the pool in which they had their leg is open.
        """
        record = known_record(mirror)
        voices: dict[str, VoterState] = {}
        unheard: dict[str, str] = {}
        gone: set[str] = set()

        async def ask(node: str) -> None:
            unheard[node] = "no answer"
            with trio.move_on_after(ASK_S):
                try:
                    voices[node] = await self.voter(node).state(record.mirror)
                    del unheard[node]
                except OSError as error:
                    why = (error.strerror or str(error)).removeprefix(f"node {node} can't be reached: ")
                    unheard[node] = "no answer" if error.errno == errno.ETIMEDOUT else why
                    if node == self.node:
                        del unheard[node]  # it is here, though it has nothing to say
                    elif error.errno == errno.ENOENT and await self._is_gone(node, record):
                        gone.add(node)

        async with trio.open_nursery() as nursery:
            for node in dict.fromkeys((self.node, *nodes_of_mirror(mirror.membership), *nodes_of_mirror(record))):
                nursery.start_soon(ask, node)
        return voices, unheard, frozenset(gone)

    async def _is_gone(self, node: str, record: Membership) -> bool:
        """Whether a node that knows nothing of a mirror has lost nothing of it either: False where it can't say."""
        pools = {leg.export.partition("/")[0] for leg in record.legs_on(node)}
        try:
            answers = [
                await self.peers.call(node, "leg.gone", {"mirror": record.mirror, "pool": pool}, ASK_S)
                for pool in sorted(pools)
            ]
        except OSError:
            return False
        return bool(answers) and all(isinstance(one, dict) and one.get("gone") is True for one in answers)

    async def _primarys_status(
        self, mirror: MirrorPart, voices: Mapping[str, VoterState], *, explain: bool = False
    ) -> dict[str, Any] | None:
        """Of the node that serves it; None if none does that can be heard."""
        for node in (node for node, voice in voices.items() if voice.primary_here and node != self.node):
            asked = {"mirror": known_record(mirror).mirror, "name": mirror.name if explain else None}
            try:
                return _judge_status(await self.peers.call(node, "mirror.status", asked, STATUS_S), explain=explain)
            except OSError:
                continue
        return None

    def _by_primary(self, own: dict[str, Any], mirror: MirrorPart, theirs: dict[str, Any]) -> dict[str, Any]:
        found = own | {key: theirs[key] for key in (*_PRIMARYS, "writes_fail", "unreadable_blocks")}
        if isinstance(mirror, LocalMirror):
            for shown in found["legs"]:
                if shown["id"] == mirror.me:  # what this node has mended by itself, it alone knows
                    shown["healed_blocks"] += mirror.volume.healed_blocks
        # That this node was deposed, or left behind, is its own problem: the primary has none.
        if own["diskless"] or mirror.is_left_behind or mirror.is_named_primary:
            found["problem"] = own["problem"] or found["problem"]
        removed = removed_here(mirror, theirs)
        if isinstance(mirror, LocalMirror):
            mirror.heard_left_over = removed is not None and not is_being_made(mirror)
        if not mirror.is_left_behind and removed is not None:
            found["problem"] = removed
        return found | {"left_over": is_left_over(mirror)}

    def _without_primary(
        self, own: dict[str, Any], mirror: MirrorPart, voices: Mapping[str, VoterState], found: Explanation
    ) -> dict[str, Any]:
        """The same that `explained` says."""
        if isinstance(mirror, LocalMirror) and found.left_over:
            mirror.heard_left_over = True
        record = newest_record(mirror, voices)
        legs = [self._leg_of_record(mirror, record, leg) for leg in record.legs]
        for shown in legs:
            shown["state"] = found.legs[shown["id"]].value
        there = {shown["id"]: shown["healed_blocks"] for shown in own["legs"]}
        for shown in legs:
            shown["healed_blocks"] = there.get(shown["id"], 0)
        shown_record = _record_status(record) if record is not known_record(mirror) else {}
        problem = own["problem"]
        if found.old is not None:
            problem = (
                f"{problem.rstrip('.')}. {_capital(found.old)}" if mirror.is_left_behind and problem else found.old
            )
        shown = {"state": found.state.value, "legs": legs, "problem": problem, "left_over": is_left_over(mirror)}
        return own | shown_record | shown

    async def statuses(self) -> list[dict[str, Any]]:
        """Of all mirrors here, asked for at once, by name."""
        found: dict[str, dict[str, Any]] = {}

        async def ask(mirror: MirrorPart) -> None:
            found[mirror.name] = await self.status(mirror)

        async with trio.open_nursery() as nursery:
            for mirror in self.all():
                nursery.start_soon(ask, mirror)
        return [found[name] for name in sorted(found)]

    async def legs_on(self, node: str) -> list[dict[str, Any]]:
        """Legs that a node has, of the mirrors that this one has a part in, as their primaries see them. JSON."""
        return [
            {
                "volume": status["volume"],
                "pool": leg["pool"],
                "role": "primary" if status["primary"] == node else "secondary",
                "state": leg["state"],
            }
            for status in await self.statuses()
            for leg in status["legs"]
            if leg["node"] == node and leg["kind"] == "terrace"
        ]


async def _leave_out(served: ServedMirror, me: str) -> None:
    """Have a record without the leg here, if another one is in sync: who is promoted then needn't wait for this one."""
    leg = served.members[me].leg if me in served.members else None
    if leg is None or not any(m.is_proof for m in served.members.values() if m.info.id != me):
        return
    served.leg_failed(leg, OSError(errno.ENODEV, "its pool is given up"))
    with trio.move_on_after(STATUS_S):
        while me in served.membership.in_sync:
            await served.changed()


async def _mend(mender: LegMender) -> None:
    try:
        await mender.run()
    except Exception as error:  # no reason to serve the mirror no more
        log.error("damage of a leg is no longer seen to, until terraced is restarted", exc_info=error)


def _is_of_another(record: bytes, mirror: str) -> bool:
    """Whether a leg's record is surely of another mirror."""
    try:
        accepted = LegRecord.decode(record).accepted
    except OSError:
        return False
    return accepted is not None and accepted.mirror != mirror


def _mirror_of(mirror: LocalMirror) -> str | None:
    accepted = mirror.keeper.record.accepted
    return accepted.mirror if accepted is not None else None


def _judge_status(theirs: Any, *, explain: bool) -> dict[str, Any]:
    """What a primary has said of its mirror. Raises OSError EPROTO for what is no such thing, or not a primary's."""
    wanted = (*_PRIMARYS, *(("headline", "text") if explain else ()))
    legs = theirs.get("legs") if isinstance(theirs, dict) else None
    if not isinstance(legs, list) or theirs.get("role") != "primary" or not theirs.keys() >= {*wanted}:
        raise OSError(errno.EPROTO, "that is no status of a mirror of its primary")
    shape = _leg(LegInfo("", "", ""), "").keys()
    if not all(isinstance(leg, dict) and leg.keys() >= shape and type(leg["healed_blocks"]) is int for leg in legs):
        raise OSError(errno.EPROTO, "there are no legs of a mirror in that")
    if type(theirs["term"]) is not int or type(theirs["epoch"]) is not int:
        raise OSError(errno.EPROTO, "there is no term of a mirror in that")
    # A primary of an older release says neither.
    blocks = theirs.get("unreadable_blocks")
    return {key: theirs[key] for key in wanted} | {
        "writes_fail": theirs.get("writes_fail") is True,
        "unreadable_blocks": blocks if type(blocks) is int else 0,
    }


def _record_status(record: Membership) -> dict[str, Any]:
    return {
        "primary": record.primary,
        "term": record.term.number,
        "epoch": record.epoch,
        "token": record.token,
        "voters": list(record.voters),
    }


def _leg(leg: LegInfo, state: str) -> dict[str, Any]:
    return {
        "id": leg.id,
        "node": leg.node,
        "export": leg.export,
        "pool": leg.export.partition("/")[0] if leg.kind == "terrace" else "-",
        "kind": leg.kind,
        "state": state,
        "for_s": None,
        "to_sync_bytes": None,
        "bytes_per_s": None,
        "eta_s": None,
        "queued_bytes": 0,
        "healed_blocks": 0,
        "error": None,
    }


def _served_legs(status: MirrorStatus, name: str, node: str) -> list[dict[str, Any]]:
    found = []
    for leg in status.legs:
        state = leg.state
        if state is LegState.OFFLINE and leg.info.id not in status.membership.in_sync:
            state = LegState.STALE
        shown = _leg(leg.info, state.value)
        progress = leg.resync if leg.state is LegState.SYNCING else None
        if progress is not None:
            shown["to_sync_bytes"] = max(0, progress.total_bytes - progress.done_bytes)
            shown["bytes_per_s"] = progress.rate_bytes_s
            shown["eta_s"] = None if progress.unread_blocks else progress.eta_s
        shown |= {"for_s": leg.for_s, "queued_bytes": leg.queued_bytes, "error": leg.error}
        shown["healed_blocks"] = leg.counters.healed_blocks
        if leg.kept_out is not None:  # also while that is tried again
            shown |= {"error": leg.kept_out, "kept_out": True}
        if notice := map_notice(name, node, status, leg):
            shown["map_damage"] = notice
        found.append(shown)
    return found


def _membership(params: dict[str, Any]) -> Membership:
    return decode(json.dumps(params.get("membership")).encode())


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _sentence(begin: str, end: str) -> str:
    return f"{begin}: {end.rstrip('.')}."


def _text(params: dict[str, Any], key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str) or not value:
        raise OSError(errno.EINVAL, f"{key} is missing in what a node has asked")
    return value


async def _without_node(call: Callable[[dict[str, Any]], Awaitable[Any]], node: str, params: dict[str, Any]) -> Any:
    return await call(params)
