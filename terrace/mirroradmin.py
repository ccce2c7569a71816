"""What operators do to mirrors: make, extend and delete them, move the primary, decide a split brain, drain a node.

Each operation may be asked for again: what is done already is no error. A node that is offline never keeps anybody from
deleting what is here; what is left there by that is told. What may lose something is refused unless `force` is said,
with a sentence of what it gives up.

**Making one.** The volume's record is written first, as a mirror of one leg, which is a mirror like any other; then
each other node makes its leg (`leg.create`, known by the leg's id, so that a repetition finds it), and the next record
names them all. A leg that is new is compared in full, which where all are empty costs nothing.
"""

from __future__ import annotations

import errno
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from replication.keeper import LegRecord
from replication.leg import BLOCK_BYTES, LegState
from replication.membership import MAX_LEGS, LegInfo, Membership, Options, Term, decode, encode
from replication.promotion import Forced, Promote, decide, new_term
from replication.verify import VerifyReport, verify
from replication.voters import ask
from terrace.diskless import DisklessMirror
from terrace.exports import StoodFor
from terrace.localmirror import LocalMirror
from terrace.mirrors import Mirrors
from terrace.primary import ASK_S, MirrorPart, ServedMirror, nodes_of
from terrace.snapshots import Clients, named
from tiers import Pool, TierError, Volume

CREATE_S: Final = 60.0
DELETE_S: Final = 30.0
HAND_OVER_S: Final = 30.0
FIND_S: Final = 5.0


@dataclass(frozen=True)
class Place:
    """Where a leg is to be; without a pool that node chooses: one called as the primary's, or its only one."""

    node: str
    pool: str | None = None


class MirrorAdmin:
    """The operations, on the node that they are asked of. Every refusal is an OSError with a sentence."""

    def __init__(self, mirrors: Mirrors, clients: Clients) -> None:
        self.mirrors = mirrors
        self._clients = clients

    # -- legs ----------------------------------------------------------------------------------------------------

    async def create(
        self, pool: Pool, name: str, size_bytes: int, policy: str, places: Sequence[Place], options: Options
    ) -> LocalMirror:
        """A new volume with a leg at each place. Nothing is left behind when it fails."""
        require_whole_blocks(f"{pool.name}/{name}", size_bytes)
        self._judge_places(places)
        volume = await pool.create_volume(name, size_bytes, policy)
        mirror: LocalMirror | None = None
        try:
            mirror = await self._begin(pool, volume, options)
            await self._add_legs(mirror, places)
        except BaseException:
            with trio.CancelScope(shield=True):
                if mirror is not None:
                    await self.mirrors.delete_local(mirror)
                else:
                    await pool.delete_volume(name, mirrored=True)
            raise
        self.mirrors.tell("mirror", volume.name, f"{volume.name} was made, mirrored to {_nodes(places)}")
        return mirror

    async def add(self, pool: Pool, volume: Volume, place: Place, options: Options) -> LocalMirror:
        """One more leg, of a volume that is mirrored or not."""
        self._judge_places([place])
        mirror = self.mirrors.of(volume)
        if mirror is None:
            return await self._add_first(pool, volume, place, options)
        await self.extend(mirror, place)
        return mirror

    async def extend(self, mirror: MirrorPart, place: Place) -> None:
        """One more leg of a mirror."""
        if place.node == self.mirrors.node and isinstance(mirror, DisklessMirror):
            raise TierError(
                errno.EINVAL,
                f"node {place.node} serves {mirror.name} without a leg: let a node with one be the primary, with "
                f"`terrace volume mirror demote {mirror.name} --to NODE`, and add the leg from there",
            )
        self._judge_places([place])
        if any(leg.node == place.node and leg.kind == "terrace" for leg in mirror.membership.legs):
            return
        if len(mirror.membership.legs) >= MAX_LEGS:
            raise TierError(errno.EINVAL, f"{mirror.name} has {MAX_LEGS} legs, which is the most; remove one first")
        await self._add_legs(mirror, [place])
        self.mirrors.tell("mirror", mirror.name, f"{mirror.name} got a leg on node {place.node}")

    async def add_voter(self, mirror: MirrorPart, node: str) -> MirrorPart:
        """A tie-breaker: a node without a leg that has a say. With three voters a majority decides who is primary."""
        served = await self.served(mirror)
        if node != self.mirrors.node:
            self.mirrors.peers.peer(node)
        membership = served.membership
        if node not in membership.voters:
            await served.reconfigure(voters=(*membership.voters, node))
            self.mirrors.tell("mirror", mirror.name, f"node {node} is a tie-breaker of {mirror.name} now")
        return mirror

    async def _add_first(self, pool: Pool, volume: Volume, place: Place, options: Options) -> LocalMirror:
        if volume.filling:
            raise TierError(errno.EBUSY, f"{volume.name} is not complete; mirror it once what fills it has ended")
        require_whole_blocks(volume.name, volume.size_bytes)
        self._require_unused(volume, "be made a mirror of")
        mirror = await self._begin(pool, volume, options)
        try:
            await self._add_legs(mirror, [place])
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.mirrors.dissolve(mirror)
            raise
        self.mirrors.tell("mirror", volume.name, f"{volume.name} is mirrored to {place.node} now")
        return mirror

    async def _begin(self, pool: Pool, volume: Volume, options: Options) -> LocalMirror:
        """A mirror of one leg."""
        node, leg, term = self.mirrors.node, secrets.token_hex(8), Term(1, secrets.token_hex(8))
        record = Membership(
            mirror=secrets.token_hex(16),
            size_bytes=volume.size_bytes,
            legs=(LegInfo(leg, node, volume.name),),
            voters=(node,),
            term=term,
            epoch=0,
            primary=node,
            in_sync=frozenset({leg}),
            options=options,
        )
        record = replace(record, history=(record.generation,))
        own = LegRecord(me=leg, promised=term, accepted=record)
        # A volume can be seen while it is made durable, and whoever has it would write to it, and not to the mirror.
        self._require_unused(volume, "make a mirror of")
        await pool.set_mirror(volume, own.encode(), {})
        mirror = self.mirrors.adopt(pool, volume)
        assert mirror is not None, "this node has a name, and wrote the record itself"
        try:
            await mirror.promote()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.mirrors.dissolve(mirror)
            raise
        return mirror

    async def _add_legs(self, mirror: MirrorPart, places: Sequence[Place]) -> None:
        served = await self.served(mirror)
        membership = served.membership
        made: list[LegInfo] = []
        try:
            for place in places:
                leg = await self._make_leg(mirror, membership, place)
                made.append(leg)
            legs = (*served.membership.legs, *made)
            voters = tuple(dict.fromkeys((*served.membership.voters, *nodes_of(legs))))
            await served.reconfigure(legs=legs, voters=voters)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._delete_legs(made)
            raise

    async def _make_leg(self, mirror: MirrorPart, membership: Membership, place: Place) -> LegInfo:
        leg = secrets.token_hex(8)
        asked = {
            "membership": _plain(membership),
            "leg": leg,
            "volume": mirror.short_name,
            "pool": place.pool,
            "like": mirror.pool_name,
            "size_bytes": mirror.size_bytes,
            "policy": mirror.policy_name,
        }
        try:
            answer = await self.mirrors.peers.call(place.node, "leg.create", asked, CREATE_S)
        except OSError as error:
            raise TierError(
                error.errno or errno.EIO, f"node {place.node} can't have a leg: {error.strerror or error}"
            ) from None
        return LegInfo(leg, place.node, str(answer["export"]))

    async def _delete_legs(self, legs: Sequence[LegInfo], *, snapshots: bool = False) -> list[str]:
        """At once, on other nodes; a sentence for each that is left."""
        left: list[str] = []
        asked: dict[str, Any] = {"snapshots": True} if snapshots else {}

        async def one(leg: LegInfo) -> None:
            try:
                with trio.fail_after(DELETE_S):
                    await self.mirrors.peers.call(leg.node, "leg.delete", asked | {"leg": leg.id}, DELETE_S)
            except (OSError, trio.TooSlowError) as error:
                why = error.strerror if isinstance(error, OSError) else f"no answer in {DELETE_S:g} s"
                left.append(
                    f"{leg.export} on node {leg.node} is still there ({why}); on that node: terrace volume delete "
                    f"{leg.export} --force"
                )

        async with trio.open_nursery() as nursery:
            for leg in legs:
                if leg.node != self.mirrors.node and leg.kind == "terrace":
                    nursery.start_soon(one, leg)
        return sorted(left)

    async def remove(self, mirror: MirrorPart, node: str, *, force: bool) -> dict[str, Any]:
        """Take a node's leg out, and delete its volume; says what is left there. A mirror of one leg ends to be one."""
        served = await self.served(mirror)
        membership = served.membership
        going = [leg for leg in membership.legs if leg.node == node]
        if not going and node in membership.voters:
            await served.reconfigure(voters=tuple(voter for voter in membership.voters if voter != node))
            self.mirrors.tell("mirror", mirror.name, f"node {node} is no tie-breaker of {mirror.name} any more")
        if not going:
            await trio.lowlevel.checkpoint()
            return {"removed": [], "left": [], "mirrored": True}
        if node == self.mirrors.node:
            raise TierError(
                errno.EBUSY,
                f"node {node} is the primary of {mirror.name}, so its leg can't be removed: `terrace volume mirror "
                f"demote {mirror.name} --to NODE` first, then remove it from there",
            )
        ids = {leg.id for leg in going}
        good = [leg.info for leg in served.status().legs if leg.state is LegState.UP_TO_DATE and leg.info.id not in ids]
        if not good and not force:
            raise TierError(
                errno.EBUSY,
                f"node {node} has the only leg of {mirror.name} that is up to date, and its data would be lost: wait "
                "for the resync of another one; --force gives up all that only this leg has",
            )
        legs = tuple(leg for leg in membership.legs if leg.id not in ids)
        tie_breakers = [voter for voter in membership.voters if voter not in nodes_of(membership.legs)]
        await served.reconfigure(legs=legs, voters=tuple(dict.fromkeys((*nodes_of(legs), *tie_breakers))))
        left = await self._delete_legs(going)
        self.mirrors.tell("mirror", mirror.name, f"the leg of {mirror.name} on node {node} was removed")
        mirrored = True
        if len(legs) == 1 and isinstance(mirror, LocalMirror) and not mirror.volume.open_count:
            await self.mirrors.dissolve(mirror)
            mirrored = False
        return {"removed": [leg.export for leg in going], "left": left, "mirrored": mirrored}

    async def delete_diskless(self, mirror: DisklessMirror, *, snapshots: bool) -> dict[str, Any]:
        """Delete all legs of what this node serves without one. Those that can't be deleted stay, and are told."""
        self._require_unused(mirror.stood_for, "delete")
        name = mirror.name
        served = await self.served(mirror)
        legs = served.membership.legs
        await mirror.demote(None)  # durable on all legs, so that what is left is worth having
        left = await self._delete_legs(legs, snapshots=snapshots)
        await self.mirrors.diskless.forget(mirror)
        self.mirrors.tell("mirror", name, f"{name} was deleted with its {len(legs)} legs")
        return {"deleted": name, "left": left}

    async def delete(self, mirror: LocalMirror, *, snapshots: bool, force: bool) -> dict[str, Any]:
        """Delete the volume with all its legs; `force`: on a node that isn't primary, only the leg there."""
        self._require_unused(mirror.volume, "delete")
        name = mirror.name
        if not mirror.serves and not force:
            membership = mirror.membership
            where = f"node {membership.primary}" if membership.primary else "a node that you promote"
            raise TierError(
                errno.EBUSY,
                f"{name} is a leg of a mirror: delete all of it at its primary, {where}, or take this leg out there "
                "with `terrace volume mirror remove`; --force deletes the copy here, which is then missing for good",
            )
        others = [leg for leg in mirror.membership.legs if leg.id != mirror.me] if mirror.serves else []
        if not snapshots and mirror.volume.snapshots:
            raise TierError(errno.ENOTEMPTY, f"{name} has snapshots: delete them first, or with it, by --snapshots")
        await self.mirrors.delete_local(mirror, snapshots=snapshots)
        left = await self._delete_legs(others)
        self.mirrors.tell("mirror", name, f"{name} was deleted with its {len(others)} other legs")
        return {"deleted": name, "left": left}

    # -- the primary ---------------------------------------------------------------------------------------------

    async def promote(self, mirror: MirrorPart, *, force: bool) -> None:
        """Let this node be primary."""
        await mirror.promote(force=force)

    async def promote_diskless(self, volume: str, source: str, *, name: str, force: bool) -> DisklessMirror:
        """Let this node be primary of a mirror that it has no leg of, and that node `source` calls `volume`."""
        if source == self.mirrors.node:
            raise TierError(errno.EINVAL, f"node {source} is this one: name one that has a leg of the mirror")
        self.mirrors.peers.peer(source)
        try:
            answer = await self.mirrors.peers.call(source, "mirror.find", {"volume": volume}, FIND_S)
        except OSError as error:
            raise TierError(
                error.errno or errno.EIO, f"node {source} can't say which mirror is meant: {error.strerror or error}"
            ) from None
        membership = decode(json.dumps(answer["membership"]).encode())
        return await self.mirrors.diskless.promote(name, membership, force=force)

    async def forget(self, mirror: DisklessMirror, *, force: bool) -> None:
        """Let this node have nothing to do with a mirror that it has no leg of. `force`: even while it is primary."""
        if (mirror.serves or mirror.starting) and not force:
            raise TierError(
                errno.EBUSY,
                f"node {self.mirrors.node} is the primary of {mirror.name}: `terrace volume mirror demote "
                f"{mirror.name}` ends that, and forgets it",
            )
        await self.mirrors.diskless.forget(mirror)
        self.mirrors.tell("mirror", mirror.name, f"node {self.mirrors.node} takes no part in {mirror.name} any more")

    async def what_force_loses(self, mirror: MirrorPart) -> str:
        """A sentence; empty if no force is needed. Asks, and changes nothing."""
        membership = mirror.membership
        nodes = tuple(dict.fromkeys((*membership.voters, *nodes_of(membership.legs))))
        states, failures = await ask(
            nodes,
            lambda node: self.mirrors.voter(node).state(membership.mirror),
            lambda answers: len(answers) == len(nodes),
            timeout_s=min(ASK_S, membership.options.timeout_s),
        )
        unheard = {node: error.strerror or str(error) for node, error in failures.items()}
        term = new_term(list(states.values()))
        me = self.mirrors.node
        alive = [node for node, state in states.items() if state.primary_here and node != me]
        plain = decide(me, term, states, unheard)
        if isinstance(plain, Promote) and not alive:
            return ""
        forced = decide(me, term, states, unheard, force=True)
        if isinstance(forced, Forced):
            return forced.may_lose
        if alive:
            return f"Node {alive[0]} is primary and alive; its clients lose what they have in flight."
        return "" if isinstance(forced, Promote) else forced.sentence

    async def demote(self, mirror: MirrorPart, *, to: str | None, force: bool) -> None:
        """Let this node not be primary; `to`: the one that is to be it."""
        if to == self.mirrors.node:
            raise TierError(
                errno.EINVAL, f"node {to} is this one: `terrace volume mirror promote` makes it the primary"
            )
        membership = mirror.membership
        diskless_to = to is not None and to not in nodes_of(membership.legs)
        asked = {"mirror": membership.mirror, "volume": mirror.name, "membership": _plain(membership)}
        if to is not None and diskless_to:
            # Before this node has ceased to be it: that one may serve it without a leg, or may not.
            await self.mirrors.peers.call(to, "mirror.judge", asked, FIND_S)
        if mirror.serves:
            if not force:
                self._require_unused(mirror.stood_for, "demote")
            served = await self.served(mirror)
            good = {leg.info.node for leg in served.status().legs if leg.state is LegState.UP_TO_DATE}
            if to is not None and not diskless_to and to not in good:
                raise TierError(
                    errno.EBUSY,
                    f"the leg on node {to} is not up to date: wait for its resync, then demote {mirror.name}",
                )
            others = sorted(good - {self.mirrors.node})
            await mirror.demote(to or (others[0] if len(others) == 1 else None if others else self.mirrors.node))
        elif mirror.starting:
            raise TierError(errno.EBUSY, f"{mirror.name} is being started; try again in a moment")
        elif membership.primary not in (None, self.mirrors.node, to):
            raise TierError(errno.EBUSY, f"node {membership.primary} is the primary of {mirror.name}: run this there")
        if to is not None:
            asked["membership"] = _plain(mirror.membership)
            await self.mirrors.peers.call(to, "mirror.promote", asked, HAND_OVER_S)
        if isinstance(mirror, DisklessMirror):
            await self.mirrors.diskless.forget(mirror)

    async def resync(self, mirror: MirrorPart, node: str, *, discard: bool, full: bool) -> None:
        """Have a leg brought up to date now. `discard`: what was written there, in a split brain, is given up."""
        served = await self.served(mirror)
        leg = next((leg for leg in served.membership.legs if leg.node == node), None)
        if leg is None or leg.id == mirror.me:
            raise TierError(errno.EINVAL, f"node {node} has no other leg of {mirror.name}")
        member = served.members[leg.id]
        if discard:
            if member.state is LegState.UP_TO_DATE:
                raise TierError(errno.EINVAL, f"the leg on node {node} is up to date: there is nothing to discard")
            await self._discard(mirror, leg)
        elif full and member.leg is not None:
            mirror.compared_in_full.add(leg.id)
            served.leg_failed(member.leg, OSError(errno.ECANCELED, "an operator wants it compared in full"))

    async def _discard(self, mirror: MirrorPart, leg: LegInfo) -> None:
        state = await self.mirrors.voter(leg.node).state(mirror.membership.mirror)
        theirs = max(
            (term.number for term in (state.promised, state.accepted and state.accepted.term) if term), default=0
        )
        if theirs >= mirror.membership.term.number:
            # Only a later term than theirs makes them let go; clients here are cut off for a moment.
            await mirror.begin_anew()
        mirror.compared_in_full.add(leg.id)
        asked = {"leg": leg.id, "membership": _plain(mirror.membership)}
        await self.mirrors.peers.call(leg.node, "leg.discard", asked, CREATE_S)

    async def verify(
        self, mirror: MirrorPart, progress: Callable[[int, int], None], *, full: bool, repair: bool
    ) -> dict[str, Any]:
        """Compare the legs in sync while clients go on. JSON: what differs, by node."""
        served = await self.served(mirror)
        report = VerifyReport()
        nodes = {leg.id: leg.node for leg in served.membership.legs}
        refusal: OSError | None = None
        async with trio.open_nursery() as nursery:

            async def tell() -> None:
                while True:
                    progress(report.done_bytes, report.total_bytes)
                    await trio.sleep(0.1)

            nursery.start_soon(tell)
            try:
                await verify(served, full=full, repair=repair, report=report)
            except OSError as error:
                refusal = error  # raised outside: a nursery would put it into a group
            finally:
                nursery.cancel_scope.cancel()
        if refusal is not None:
            raise TierError(refusal.errno or errno.EIO, refusal.strerror or str(refusal))

        def ranges(found: dict[str, list[tuple[int, int]]]) -> list[dict[str, Any]]:
            return [
                {"node": nodes.get(leg, leg), "offset": offset, "length": length}
                for leg, pieces in found.items()
                for offset, length in pieces
            ]

        found = {
            "volume": mirror.name,
            "full": full,
            "compared": [nodes.get(leg, leg) for leg in report.compared],
            "compared_bytes": report.done_bytes,
            "differing_bytes": report.differing_bytes,
            "repaired_bytes": report.repaired_bytes,
            "differing": ranges(report.differing),
            "unreadable": ranges(report.unreadable),
            "equal": report.equal,
        }
        if not report.equal:
            what = f"{report.differing_bytes} bytes differ, {report.repaired_bytes} of them were repaired"
            self.mirrors.tell("mirror", mirror.name, f"the legs of {mirror.name} are not equal: {what}")
        return found

    # -- a node --------------------------------------------------------------------------------------------------

    async def drain(self, node: str, *, to: str | None, dry_run: bool) -> dict[str, Any]:
        """What makes this node ready to be taken down, done unless `dry_run`. {demote: [...], refused: [...]}."""
        if node != self.mirrors.node:
            self.mirrors.peers.peer(node)
            raise TierError(errno.EINVAL, f"node {node} is another one: run terrace node drain {node} there")
        demote: list[MirrorPart] = []
        refused: list[str] = []
        for mirror in self.mirrors.all():
            status = await self.mirrors.status(mirror)
            good = [leg["node"] for leg in status["legs"] if leg["state"] == LegState.UP_TO_DATE.value]
            if set(good) == {node}:
                refused.append(
                    f"{mirror.name} has its only up-to-date leg here; wait for a resync, or remove the mirror"
                )
            elif mirror.is_primary or mirror.starting:
                users = self._clients(mirror.name)
                if mirror.stood_for.open_count:
                    refused.append(
                        f"{mirror.name} is in use by {named(users) if users else 'clients'}; disconnect first"
                    )
                elif to is not None and to not in good:
                    refused.append(f"{mirror.name} has no up-to-date leg on node {to}")
                else:
                    demote.append(mirror)
        if not dry_run and not refused:
            for mirror in demote:
                await self.demote(mirror, to=to, force=False)
        return {"node": node, "demote": [mirror.name for mirror in demote], "refused": refused, "dry_run": dry_run}

    # -- what all need -------------------------------------------------------------------------------------------

    async def served(self, mirror: MirrorPart) -> ServedMirror:
        """The mirror, where this node is its primary. Raises EBUSY that names the one that is."""
        if mirror.serves:
            assert mirror.mirror is not None
            await trio.lowlevel.checkpoint()
            return mirror.mirror
        primary = mirror.membership.primary
        if primary not in (None, self.mirrors.node):
            raise TierError(errno.EBUSY, f"node {primary} is the primary of {mirror.name}: run this there")
        if mirror.starting:
            return await mirror.serving()
        raise mirror.refusal()

    def _judge_places(self, places: Sequence[Place]) -> None:
        if not self.mirrors.node:
            raise TierError(
                errno.EINVAL,
                "this node has no name, so it can't mirror: set name under [node] in the configuration, and the other "
                "nodes under [peers.NAME]",
            )
        if len(places) >= MAX_LEGS:
            raise TierError(errno.EINVAL, f"a mirror has {MAX_LEGS} legs at most, that on this node among them")
        for index, place in enumerate(places):
            if place.node == self.mirrors.node:
                raise TierError(
                    errno.EINVAL, f"node {place.node} is this one, which has a leg anyway: name the other nodes"
                )
            self.mirrors.peers.peer(place.node)
            if any(one.node == place.node for one in places[:index]):
                raise TierError(errno.EINVAL, f"node {place.node} is named twice: one leg on a node is what helps")

    def _require_unused(self, volume: StoodFor, what: str) -> None:
        if volume.open_count:
            users = self._clients(volume.name)
            shown = named(users) if users else "clients"
            raise TierError(
                errno.EBUSY, f"can't {what} {volume.name}, which is in use by {shown}: disconnect them first"
            )


def _plain(membership: Membership) -> Any:
    return json.loads(encode(membership))


def _nodes(places: Sequence[Place]) -> str:
    return ", ".join(place.node for place in places)


def require_whole_blocks(name: str, size_bytes: int) -> None:
    """A leg gets whole blocks only. Raises TierError EINVAL for a size that ends within one."""
    if size_bytes % BLOCK_BYTES:
        above = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        raise TierError(
            errno.EINVAL,
            f"{name} can't be mirrored with {size_bytes} bytes: the size of a mirror is a multiple of {BLOCK_BYTES}, "
            f"such as {above}",
        )
