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
import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import trio

from nbd.uri import export_of, parse_target
from replication.explain import last_leg_on
from replication.keeper import LegRecord
from replication.leg import BLOCK_BYTES, LegState
from replication.membership import MAX_LEGS, LegInfo, Membership, Options, Term, decode, encode
from replication.nbdleg import probe, unfenced
from replication.promotion import Forced, Promote, decide, new_term
from replication.verify import VerifyReport, verify
from replication.voters import ask
from terrace.diskless import DisklessMirror
from terrace.exports import StoodFor
from terrace.keptstate import is_kept_state
from terrace.localmirror import LocalMirror
from terrace.mirrors import Mirrors
from terrace.mirrorsnapshots import MirrorSnapshots
from terrace.mirrorwords import about_map
from terrace.oneatatime import OneAtATime
from terrace.primary import ASK_S, MirrorPart, ServedMirror, nodes_of, nodes_of_mirror
from terrace.sameexports import SameExports
from terrace.snapshots import Clients, named
from tiers import Pool, TierError, Volume, validate_volume_size

CREATE_S: Final = 60.0
DELETE_S: Final = 30.0
HAND_OVER_S: Final = 30.0
DOUBT_S: Final = 10.0
"""So long it is waited for a record of which it isn't known whether it counts."""

Arbiters = Literal["legs", "etcd"]
FIND_S: Final = 5.0


@dataclass(frozen=True)
class Place:
    """Where a leg is to be; without a pool that node chooses: one called as the primary's, or its only one."""

    node: str
    """Or the URI of an export of any NBD server."""
    pool: str | None = None

    @property
    def is_nbd(self) -> bool:
        """It is no node."""
        return is_uri(self.node)


def is_uri(place: str) -> bool:
    """Whether an NBD server is meant, and not a node."""
    return "://" in place


class MirrorAdmin:
    """The operations, on the node that they are asked of. Every refusal is an OSError with a sentence."""

    def __init__(self, mirrors: Mirrors, clients: Clients, snapshots: MirrorSnapshots) -> None:
        self.mirrors = mirrors
        self.snapshots = snapshots
        self._clients = clients
        self._one_at_a_time = OneAtATime()
        self._exports = SameExports()

    # -- legs ----------------------------------------------------------------------------------------------------

    async def create(
        self, pool: Pool, name: str, size_bytes: int, policy: str, places: Sequence[Place], options: Options
    ) -> LocalMirror:
        """A new volume with a leg at each place. When it fails nothing is left behind, but what a record may have."""
        require_mirror_size(f"{pool.name}/{name}", size_bytes)
        await self._judge_places(places)
        await self._require_arbiter(options, f"{pool.name}/{name}", "made")
        async with self._one_at_a_time.changing(f"{pool.name}/{name}"):
            mirror = await self._create(pool, name, size_bytes, policy, places, options)
        self.mirrors.tell("mirror", mirror.name, f"{mirror.name} was made, mirrored to {_nodes(places)}")
        return mirror

    async def _create(
        self, pool: Pool, name: str, size_bytes: int, policy: str, places: Sequence[Place], options: Options
    ) -> LocalMirror:
        self._require_not_begun(pool, name, places)
        volume = await pool.create_volume(name, size_bytes, policy)
        mirror: LocalMirror | None = None
        try:
            mirror = await self._begin(pool, volume, options)
            await self._add_legs(mirror, places)
        except BaseException:
            with trio.CancelScope(shield=True):
                if mirror is None:
                    await pool.delete_volume(name, mirrored=True)
                elif not _may_have_others(mirror):
                    record = mirror.membership
                    await self.mirrors.delete_local(mirror)
                    await self.mirrors.forget_at_arbiter(record)
            raise
        return mirror

    def _require_not_begun(self, pool: Pool, name: str, places: Sequence[Place]) -> None:
        """Raises TierError EEXIST, with the way on, where there is that mirror with fewer legs than it is to have."""
        volume = next((one for one in pool.volumes() if one.short_name == name), None)
        mirror = self.mirrors.of(volume) if volume is not None else None
        if mirror is None or mirror.accepted is None:
            return
        legs = mirror.accepted.legs
        missing = [place for place in places if not any(_is_same(leg, place) for leg in legs)]
        if len(legs) > len(places) or not missing:
            return
        steps = " and ".join(f"`terrace volume mirror add {mirror.name} {_written(place)}`" for place in missing)
        raise TierError(
            errno.EEXIST,
            f"there is a volume {mirror.name} already, a mirror with a leg on {', '.join(leg.place for leg in legs)} "
            f"and none on {_nodes(missing)}: if its creation was broken off, go on with {steps}; else choose another "
            "name, or delete it first",
        )

    async def add(
        self, pool: Pool, volume: Volume, place: Place, options: Options, *, arbiter: Arbiters | None = None
    ) -> LocalMirror:
        """One more leg, of a volume that is mirrored or not; only for one that isn't an `arbiter` may be chosen."""
        await self._judge_places([place])
        async with self._one_at_a_time.changing(volume.name):
            return await self._add(pool, volume, place, options, arbiter)

    async def _add(
        self, pool: Pool, volume: Volume, place: Place, options: Options, arbiter: Arbiters | None
    ) -> LocalMirror:
        mirror = self.mirrors.of(volume)
        if mirror is None:
            return await self._add_first(pool, volume, place, replace(options, arbiter=arbiter or "legs"))
        options = mirror.membership.options
        if arbiter not in (None, options.arbiter):
            raise TierError(
                errno.EINVAL,
                f"{volume.name} is a mirror whose arbiter is {options.arbiter}, which is chosen when a volume becomes "
                "a mirror: remove its other legs (`terrace volume mirror remove`), which leaves a plain volume, then "
                f"add one with --arbiter {arbiter}",
            )
        await self._extend(mirror, place)
        return mirror

    async def extend(self, mirror: MirrorPart, place: Place) -> None:
        """One more leg of a mirror."""
        if place.node == self.mirrors.node and isinstance(mirror, DisklessMirror):
            raise TierError(
                errno.EINVAL,
                f"node {place.node} serves {mirror.name} without a leg: let a node with one be the primary, with "
                f"`terrace volume mirror demote {mirror.name} --to NODE`, and add the leg from there",
            )
        await self._judge_places([place])
        async with self._one_at_a_time.changing(mirror.name):
            await self._extend(mirror, place)

    async def _extend(self, mirror: MirrorPart, place: Place) -> None:
        if any(_is_same(leg, place) for leg in mirror.membership.legs):
            return
        others = {leg.export: leg.export for leg in mirror.membership.legs if leg.kind == "nbd"}
        if place.is_nbd and (other := await self._exports.same(place.node, others)) is not None:
            raise TierError(
                errno.EEXIST, f"{place.node} is the export {other}, which is a leg of {mirror.name} already"
            )
        if len(mirror.membership.legs) >= MAX_LEGS:
            raise TierError(errno.EINVAL, f"{mirror.name} has {MAX_LEGS} legs, which is the most; remove one first")
        await self._add_legs(mirror, [place])
        self.mirrors.tell("mirror", mirror.name, f"{mirror.name} got a leg on {_named(place)}")

    async def add_voter(self, mirror: MirrorPart, node: str) -> MirrorPart:
        """A tie-breaker: a node without a leg that has a say. With three voters a majority decides who is primary."""
        served = await self.served(mirror)
        if node != self.mirrors.node:
            self.mirrors.peers.peer(node)
        async with self._one_at_a_time.changing(mirror.name):
            membership = served.membership
            if node in membership.voters:
                return mirror
            await served.reconfigure(voters=(*membership.voters, node))
            self.mirrors.tell("mirror", mirror.name, f"node {node} is a tie-breaker of {mirror.name} now")
        return mirror

    async def _add_first(self, pool: Pool, volume: Volume, place: Place, options: Options) -> LocalMirror:
        if volume.filling:
            raise TierError(errno.EBUSY, f"{volume.name} is not complete; mirror it once what fills it has ended")
        require_mirror_size(volume.name, volume.size_bytes)
        if theirs := [one.name for one in pool.snapshots(volume.short_name) if is_kept_state(one.short_name)]:
            raise TierError(
                errno.EEXIST,
                f"{theirs[0]} has a name that resyncs of mirrors give, and delete: rename it first, with `terrace "
                f"snapshot rename`, or delete it",
            )
        self.require_unused(volume, "be made a mirror of")
        await self._require_arbiter(options, volume.name, "mirrored")
        mirror = await self._begin(pool, volume, options)
        try:
            await self._add_legs(mirror, [place])
        except BaseException:
            with trio.CancelScope(shield=True):
                if not _may_have_others(mirror):
                    record = mirror.membership
                    await self.mirrors.dissolve(mirror)
                    await self.mirrors.forget_at_arbiter(record)
            raise
        self.mirrors.tell("mirror", volume.name, f"{volume.name} is mirrored to {_named(place)} now")
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
        self.require_unused(volume, "make a mirror of")
        try:
            await pool.set_mirror(volume, own.encode(), {})
        except BaseException:
            # The volume has it all the same, and nobody would serve it as what it says.
            with trio.CancelScope(shield=True), suppress(OSError):
                await pool.set_mirror(volume, b"", {})
            raise
        mirror = self.mirrors.adopt(pool, volume, is_new=True)
        assert mirror is not None, "this node has a name, and wrote the record itself"
        try:
            await mirror.promote()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.mirrors.dissolve(mirror)
                await self.mirrors.forget_at_arbiter(record)
            raise
        return mirror

    async def _add_legs(self, mirror: MirrorPart, places: Sequence[Place]) -> None:
        exports = await self._exports.marks(place.node for place in places if place.is_nbd)
        with self._one_at_a_time.claiming(mirror.name, exports):
            await self._add_claimed(mirror, places)

    async def _add_claimed(self, mirror: MirrorPart, places: Sequence[Place]) -> None:
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
        except BaseException as error:
            with trio.CancelScope(shield=True):
                counts, doubtful = await _which_count(served, made)
                if made and counts == {leg.id for leg in made} and isinstance(error, OSError):
                    return  # the record counts: only its answer was lost
                await self._delete_legs([leg for leg in made if leg.id not in counts | doubtful], served.membership)
                if doubtful:
                    left = [leg for leg in made if leg.id in doubtful]
                    sentence = _in_doubt(mirror.name, left)
                    self.mirrors.tell("mirror", mirror.name, sentence)
                    if isinstance(error, OSError):
                        raise TierError(errno.ETIMEDOUT, f"{error.strerror or error}; {sentence}") from None
            raise

    async def _make_leg(self, mirror: MirrorPart, membership: Membership, place: Place) -> LegInfo:
        leg = secrets.token_hex(8)
        if place.is_nbd:
            await self._require_no_others(mirror, place.node)
            await self._probe(mirror, membership, place.node)
            return LegInfo(leg, self.mirrors.node, place.node, "nbd")
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

    async def _require_no_others(self, mirror: MirrorPart, uri: str) -> None:
        """Raises EBUSY with the other mirror that has that export, however its URI is written."""
        owners = {
            leg.export: other.name
            for other in self.mirrors.all()
            if other is not mirror
            for leg in _legs_by_any(other)
            if leg.kind == "nbd"
        }
        taken = await self._exports.same(uri, {export: export for export in owners})
        if taken is not None:
            # A name may be what hides it.
            same = "" if export_of(taken) == export_of(uri) else f", as {taken}"
            raise TierError(
                errno.EBUSY,
                f"{uri} is a leg of {owners[taken]}{same}, and each would overwrite the other one's data: use another "
                "export",
            )

    async def _probe(self, mirror: MirrorPart, membership: Membership, uri: str) -> None:
        """Whether it can be a leg of that mirror. Raises TierError with a sentence."""
        clients = mirror.stood_for.open_count

        def is_other() -> None:
            if mirror.stood_for.open_count > clients:
                raise OSError(errno.EINVAL, "that is the volume itself, which would write to itself for ever")

        timeout_s = membership.options.timeout_s
        try:
            await probe(uri, membership.size_bytes, timeout_s=timeout_s, while_connected=is_other)
        except OSError as error:
            raise TierError(
                error.errno or errno.EIO, f"{uri} can't be a leg of {mirror.name}: {error.strerror or error}"
            ) from None

    async def _delete_legs(
        self, legs: Sequence[LegInfo], record: Membership, *, whole: bool = False, snapshots: bool = False
    ) -> list[str]:
        """At once, on other nodes; a sentence for each that is left.

        `record`: by which this node is primary; they aren't in it any more, or `whole`: the mirror is deleted.
        """
        left: list[str] = []
        order = {"membership": _plain(record), "whole": whole, "snapshots": snapshots}

        async def one(leg: LegInfo) -> None:
            try:
                with trio.fail_after(DELETE_S):
                    await self.mirrors.peers.call(leg.node, "leg.delete", order | {"leg": leg.id}, DELETE_S)
            except (OSError, trio.TooSlowError) as error:
                why = error.strerror if isinstance(error, OSError) else f"no answer in {DELETE_S:g} s"
                # Where nobody has answered it may have some, as the volume that it is a copy of.
                has_some = snapshots or (isinstance(error, OSError) and error.errno == errno.ENOTEMPTY)
                left.append(_still_there(leg.node, leg.export, str(why), snapshots=has_some))

        left += [f"the data on {leg.export}, which is no leg any more" for leg in legs if leg.kind == "nbd"]
        async with trio.open_nursery() as nursery:
            for leg in legs:
                if leg.node != self.mirrors.node and leg.kind == "terrace":
                    nursery.start_soon(one, leg)
        return sorted(left)

    async def _forget_at(self, voters: Iterable[str], record: Membership, *, whole: bool = False) -> list[str]:
        """Tie-breakers that aren't voters any more, or `whole`: of a mirror that is none. A sentence for each left."""
        left: list[str] = []
        order = {"membership": _plain(record), "whole": whole}
        for node in voters:
            try:
                if node != self.mirrors.node:
                    await self.mirrors.peers.call(node, "mirror.forget", order)
                elif whole:
                    await self.mirrors.own_voter.forget(record.mirror)
            except OSError as error:
                left.append(_not_told(node, str(error.strerror)))
        return left

    async def remove(self, mirror: MirrorPart, node: str, *, force: bool) -> dict[str, Any]:
        """Take a node's leg out, and delete its volume; says what is left there. A mirror of one leg ends to be one.

        `node`: or a URI of an NBD server, where nothing is deleted. `voter`: it was a tie-breaker, and isn't any more.
        """
        async with self._one_at_a_time.changing(mirror.name):
            return await self._remove(mirror, node, force=force)

    async def _remove(self, mirror: MirrorPart, node: str, *, force: bool) -> dict[str, Any]:
        served = await self.served(mirror)
        membership = served.membership
        going = [leg for leg in membership.legs if _is_same(leg, Place(node))]
        is_voter = not going and node in membership.voters
        was_primary = not going and not is_voter and node in unfenced(membership, self.mirrors.node)
        if not going and not is_voter and not was_primary:
            self._require_known(mirror, membership, node)
        await self._require_arbiter(membership.options, mirror.name, "changed")
        done: dict[str, Any] = {"removed": [], "left": [], "mirrored": True, "voter": is_voter}
        if is_voter:
            await served.reconfigure(voters=tuple(voter for voter in membership.voters if voter != node))
            self.mirrors.tell("mirror", mirror.name, f"node {node} is no tie-breaker of {mirror.name} any more")
            return done | {"left": await self._forget_at([node], served.membership)}
        if not going:
            await trio.lowlevel.checkpoint()
            if was_primary:
                # It was primary without a leg or a say, so no record can say that it is gone: this term goes by it.
                mirror.is_gone(node)
                self.mirrors.tell("mirror", mirror.name, f"node {node}, once primary of {mirror.name}, is gone")
            elif not is_uri(node) and node != self.mirrors.node:
                names = {
                    there: name
                    for one in await self.mirrors.removed.of(_identity(mirror))
                    for there, name in one.names.items()
                    if one.record.mirror == membership.mirror
                }
                done |= await self._delete_left_over(
                    mirror.name, membership, node, name=names.get(node, ""), snapshots=force
                )
                if not done["left"]:
                    await self.mirrors.removed.drop(_identity(mirror), membership.mirror, [node])
            return done | await self._ended_if_alone(mirror, served, done["left"], node)
        if node == self.mirrors.node:
            raise TierError(
                errno.EBUSY,
                f"node {node} is the primary of {mirror.name}, so its leg can't be removed: `terrace volume mirror "
                f"demote {mirror.name} --to NODE` first, then remove it from there",
            )
        ids = {leg.id for leg in going}
        good = [
            leg.info
            for leg in served.status().legs
            if leg.state is LegState.UP_TO_DATE and leg.info.id not in ids and leg.info.kind == "terrace"
        ]
        if not good:
            # Not by force either: no record could follow, and this would wait for one for ever.
            raise TierError(
                errno.EBUSY,
                f"node {node} has the only leg of {mirror.name} that is up to date, and its data would be lost: wait "
                "for the resync of another one. If they are to be given up, stop that node, and promote another with "
                "`terrace volume mirror promote --force`",
            )
        if not force and isinstance(mirror, LocalMirror):
            await self._require_no_more_snapshots(mirror, going)
        membership = served.membership
        legs = tuple(leg for leg in membership.legs if leg.id not in ids)
        tie_breakers = [voter for voter in membership.voters if voter not in nodes_of(membership.legs)]
        await served.reconfigure(legs=legs, voters=tuple(dict.fromkeys((*nodes_of(legs), *tie_breakers))))
        # Without a leg here it isn't known what only that one has: it stays, and is told as left.
        snapshots = force or isinstance(mirror, LocalMirror)
        names = {leg.node: leg.export for leg in going if leg.kind == "terrace"}
        await self.mirrors.removed.add(_identity(mirror), served.membership, names)
        left = await self._delete_legs(going, served.membership, snapshots=snapshots)
        if not left:
            await self.mirrors.removed.drop(_identity(mirror), membership.mirror, names)
        self.mirrors.tell("mirror", mirror.name, f"the leg of {mirror.name} on {_named(Place(node))} was removed")
        done |= {"removed": [leg.export for leg in going]}
        return done | await self._ended_if_alone(mirror, served, left, node)

    async def _ended_if_alone(
        self, mirror: MirrorPart, served: ServedMirror, left: list[str], removed: str
    ) -> dict[str, Any]:
        """A mirror of one leg, here, that nobody uses is a plain volume afterwards. {left, mirrored}.

        `removed`: the node that has had a leg until now, and keeps its promise for as long as there is the mirror.
        """
        record = served.membership
        if len(record.legs) > 1 or not isinstance(mirror, LocalMirror) or mirror.stood_for.open_count:
            return {"left": left, "mirrored": True}
        tie_breakers = [voter for voter in record.voters if voter not in nodes_of(record.legs)]
        identity = _identity(mirror)
        # The record is nowhere else once the volume is a plain one, and what is left elsewhere obeys no other.
        await self.mirrors.removed.add(identity, record, dict.fromkeys(tie_breakers, ""))
        await self.mirrors.dissolve(mirror)
        left = left + await self.mirrors.forget_at_arbiter(record)
        forget = [*tie_breakers, *([] if is_uri(removed) or removed in tie_breakers else [removed])]
        for node in (*forget, self.mirrors.node):
            if not await self._forget_at([node], record, whole=True) and node in tie_breakers:
                await self.mirrors.removed.drop(identity, record.mirror, [node])
        return {"left": left, "mirrored": False}

    async def _delete_left_over(
        self, mirror: str, record: Membership, node: str, *, name: str, snapshots: bool, whole: bool = False
    ) -> dict[str, Any]:
        """What a node has of a leg that the record has no more, or as a tie-breaker: its removal was broken off.

        `name`: of the volume there, if known; `whole`: the mirror has ended. {removed, voter} or {left}.
        """
        order = {"membership": _plain(record), "leg": "", "whole": False, "snapshots": snapshots}
        try:
            with trio.fail_after(DELETE_S):
                answer = await self.mirrors.peers.call(node, "leg.delete", order, DELETE_S)
        except (OSError, trio.TooSlowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                return {}  # of a release that is asked for a leg by its id only
            why = str(error.strerror) if isinstance(error, OSError) else f"no answer in {DELETE_S:g} s"
            if name:
                return {"left": [_still_there(node, name, why, snapshots=True)]}
            return {
                "left": [
                    f"what node {node} may have of a leg of {mirror}, which is none any more ({why}): `terrace volume "
                    "mirror list` on that node names it, with the command that deletes it"
                ]
            }
        deleted = answer.get("deleted") if isinstance(answer, dict) else None
        order = {"membership": _plain(record), "whole": whole}
        try:
            told = await self.mirrors.peers.call(node, "mirror.forget", order, FIND_S)
        except OSError as error:
            return {
                "removed": [deleted] if isinstance(deleted, str) else [],
                "left": [_not_told(node, str(error.strerror))],
            }
        forgotten = isinstance(told, dict) and told.get("forgotten") is True
        return {"removed": [deleted] if isinstance(deleted, str) else [], "voter": forgotten and deleted is None}

    async def nothing_to_remove(self, pool: Pool, volume: Volume, node: str) -> dict[str, Any]:
        """As `remove`, of a volume that isn't mirrored, as after the last removal. Raises TierError ENOENT.

        What `node` has kept, as it was away then, goes: of no other mirror than those that this very volume has had.
        """
        if not is_uri(node) and node != self.mirrors.node and node not in self.mirrors.peers.peers:
            raise TierError(
                errno.ENOENT, f"{volume.name} is not mirrored, and {node} is no node that this one knows either"
            )
        done: dict[str, Any] = {"removed": [], "left": [], "mirrored": False, "voter": False}
        identity = _volume_identity(pool, volume)
        for one in await self.mirrors.removed.of(identity):
            if node not in one.names:
                continue
            found = await self._delete_left_over(
                volume.name, one.record, node, name=one.names[node], snapshots=True, whole=True
            )
            done["removed"] += found.get("removed", [])
            done["left"] += found.get("left", [])
            done["voter"] = done["voter"] or found.get("voter", False)
            if not found.get("left"):
                await self.mirrors.removed.drop(identity, one.record.mirror, [node])
        return done

    def _require_known(self, mirror: MirrorPart, membership: Membership, node: str) -> None:
        """What has no leg any more is no error, as it may be asked for again; but it must be one that could have had
        one. Raises TierError ENOENT with the legs that there are.

        Of a URI nobody knows that. Where there is a leg on another NBD server it is one that was mistyped, or was
        removed before, which to believe by mistake leaves a leg there that was meant to go.
        """
        legs = ", ".join(leg.place for leg in membership.legs)
        if is_uri(node):
            if not any(leg.kind == "nbd" for leg in membership.legs):
                return
            raise TierError(
                errno.ENOENT, f"{mirror.name} has no leg {node}, nothing was removed: it has legs on {legs}"
            )
        if node == self.mirrors.node or node in self.mirrors.peers.peers:
            return
        raise TierError(
            errno.ENOENT,
            f"{mirror.name} has no leg on {node}, which is no node that this one knows either: it has legs on {legs}",
        )

    async def _require_no_more_snapshots(self, mirror: LocalMirror, going: Sequence[LegInfo]) -> None:
        """The snapshots of a leg go with it: none that no leg here has may go unsaid."""
        found = await self.snapshots.where(mirror.pool, mirror.volume.short_name)
        if found is None:
            return
        here = {one.short_name for one in mirror.volume_snapshots()}
        for leg in going:
            there = found.names.get(leg.node)
            only = sorted(set(there or ()) - here)
            if only:
                shown = ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
                raise TierError(
                    errno.EBUSY,
                    f"the leg of {mirror.name} on node {leg.node} has snapshots that are not here and would be lost: "
                    f"{shown}; back them up there, or --force gives them up",
                )

    async def delete_diskless(self, mirror: DisklessMirror, *, snapshots: bool) -> dict[str, Any]:
        """Delete all legs of what this node serves without one. Those that can't be deleted stay, and are told."""
        self.require_unused(mirror.stood_for, "delete")
        name = mirror.name
        served = await self.served(mirror)
        await served.flush()  # so that what is left is worth having
        # Not demoted before: the legs obey who is primary by the record.
        await self.mirrors.diskless.forget(mirror)
        record = _last_record(served)
        tie_breakers = [voter for voter in record.voters if voter not in nodes_of(record.legs)]
        left = await self._delete_legs(record.legs, record, whole=True, snapshots=snapshots)
        await self._forget_at(tie_breakers, record, whole=True)
        left += await self.mirrors.forget_at_arbiter(record)
        self.mirrors.tell("mirror", name, f"{name} was deleted with its {len(record.legs)} legs")
        return {"deleted": name, "left": left}

    async def delete(self, mirror: LocalMirror, *, snapshots: bool, force: bool) -> dict[str, Any]:
        """Delete the volume with all its legs; `force`: on a node that isn't primary, only the leg there."""
        self.require_unused(mirror.volume, "delete")
        name = mirror.name
        if not mirror.serves and not force:
            membership = mirror.membership
            where = f"node {membership.primary}" if membership.primary else "a node that you promote"
            raise TierError(
                errno.EBUSY,
                f"{name} is a leg of a mirror: delete all of it at its primary, {where}, or take this leg out there "
                "with `terrace volume mirror remove`; --force deletes the copy here, which is then missing for good",
            )
        served = mirror.mirror if mirror.serves else None
        record = mirror.membership
        # Where it isn't served the record here may be an old one, whoever it says is primary: others may serve it now,
        # and so neither they nor the arbiter may forget it.
        whole = served is not None or (record.primary == self.mirrors.node and len(record.legs) == 1)
        if not snapshots and mirror.volume.snapshots:
            raise TierError(errno.ENOTEMPTY, f"{name} has snapshots: delete them first, or with it, by --snapshots")
        if not whole:
            await self.mirrors.own_voter.retire(record)  # before its promise goes with the leg
        await self.mirrors.delete_local(mirror, snapshots=snapshots)
        if served is not None:
            record = _last_record(served)
        others = [leg for leg in record.legs if leg.id != mirror.me] if served is not None else []
        tie_breakers = [voter for voter in record.voters if voter not in nodes_of(record.legs)] if whole else []
        left = await self._delete_legs(others, record, whole=True, snapshots=snapshots)
        if whole:
            await self._forget_at((*tie_breakers, self.mirrors.node), record, whole=True)
            left += await self.mirrors.forget_at_arbiter(record)
        self.mirrors.tell("mirror", name, f"{name} was deleted{_with_others(len(others))}")
        return {"deleted": name, "left": left}

    async def delete_broken(self, pool: Pool, volume: Volume, *, snapshots: bool) -> dict[str, Any]:
        """A leg whose record can't be understood: the copy here, whatever the others may say; says what is left."""
        self.require_unused(volume, "delete")
        name = volume.name
        if not snapshots and volume.snapshots:
            raise TierError(errno.ENOTEMPTY, f"{name} has snapshots: delete them first, or with it, by --snapshots")
        await self.mirrors.delete_broken(pool, volume, snapshots=snapshots)
        self.mirrors.tell("mirror", name, f"{name} was deleted by force: its record as a leg couldn't be understood")
        left = (
            f"what other nodes have of the mirror that {name} was a leg of, as its record couldn't be understood: "
            "`terrace volume mirror remove` at its primary, or `terrace volume delete --force` on these"
        )
        return {"deleted": name, "left": [left]}

    # -- the primary ---------------------------------------------------------------------------------------------

    async def promote(self, mirror: MirrorPart, *, force: bool) -> None:
        """Let this node be primary."""
        if not mirror.serves and mirror.accepted is not None:
            await self._require_arbiter(mirror.membership.options, mirror.name, "promoted")
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
        nodes = nodes_of_mirror(membership)
        states, failures = await ask(
            nodes,
            lambda node: self.mirrors.voter(node).state(membership.mirror),
            lambda answers: len(answers) == len(nodes),
            timeout_s=min(ASK_S, membership.options.timeout_s),
        )
        unheard = {node: error.strerror or str(error) for node, error in failures.items()}
        truth = await self._arbiters(mirror)
        term = new_term(list(states.values()), truth)
        me = self.mirrors.node
        alive = [node for node, state in states.items() if state.primary_here and node != me]
        plain = decide(me, term, states, unheard, arbiter=truth)
        if isinstance(plain, Promote) and not alive:
            return ""
        forced = decide(me, term, states, unheard, arbiter=truth, force=True)
        if isinstance(forced, Forced):
            return forced.may_lose
        if alive:
            return f"Node {alive[0]} is primary and alive; its clients lose what they have in flight."
        return "" if isinstance(forced, Promote) else forced.sentence + mirror.way_out()

    async def demote(self, mirror: MirrorPart, *, to: str | None, force: bool) -> None:
        """Let this node not be primary; `to`: the one that is to be it."""
        if to == self.mirrors.node:
            raise TierError(
                errno.EINVAL, f"node {to} is this one: `terrace volume mirror promote` makes it the primary"
            )
        membership = mirror.membership
        if not mirror.serves and not mirror.starting and membership.primary not in (None, self.mirrors.node, to):
            raise TierError(errno.EBUSY, f"node {membership.primary} is the primary of {mirror.name}: run this there")
        diskless_to = to is not None and to not in nodes_of(membership.legs)
        asked = {"mirror": membership.mirror, "volume": mirror.name, "membership": _plain(membership)}
        if to is not None and diskless_to:
            # Before this node has ceased to be it: that one may serve it without a leg, or may not.
            await self.mirrors.peers.call(to, "mirror.judge", asked, FIND_S)
        if mirror.serves:
            await self._require_arbiter(membership.options, mirror.name, "demoted")
            if not force:
                self.require_unused(mirror.stood_for, "demote")
            served = await self.served(mirror)
            good = {
                leg.info.node
                for leg in served.status().legs
                if leg.state is LegState.UP_TO_DATE and leg.info.kind == "terrace"
            }
            if to is not None and not diskless_to and to not in good:
                raise TierError(
                    errno.EBUSY,
                    f"the leg on node {to} is not up to date: wait for its resync, then demote {mirror.name}",
                )
            others = sorted(good - {self.mirrors.node})
            await mirror.demote(to or (others[0] if len(others) == 1 else None if others else self.mirrors.node))
        elif mirror.starting:
            raise TierError(errno.EBUSY, f"{mirror.name} is being started; try again in a moment")
        if to is not None:
            asked["membership"] = _plain(mirror.membership)
            await self.mirrors.peers.call(to, "mirror.promote", asked, HAND_OVER_S)
        if isinstance(mirror, DisklessMirror):
            await self.mirrors.diskless.forget(mirror)

    async def resync(self, mirror: MirrorPart, node: str, *, discard: bool, full: bool) -> None:
        """Have a leg brought up to date now. `discard`: what was written there, in a split brain, is given up.

        Raises TierError EBUSY for `full` of the only leg in sync.
        """
        served = await self.served(mirror)
        leg = next((leg for leg in served.membership.legs if _is_same(leg, Place(node))), None)
        if leg is None or leg.id == mirror.me:
            raise TierError(
                errno.EINVAL,
                f"{node} is no leg of {mirror.name}"
                if is_uri(node)
                else f"node {node} has no other leg of {mirror.name}",
            )
        member = served.members[leg.id]
        if discard and leg.kind == "nbd":
            raise TierError(errno.EINVAL, f"{node} has no history of its own, and so no split brain: say --full")
        if discard:
            if member.state is LegState.UP_TO_DATE:
                raise TierError(errno.EINVAL, f"the leg on node {node} is up to date: there is nothing to discard")
            await self._discard(mirror, leg)
        elif member.leg is None and member.error is not None and member.error.errno == errno.EUCLEAN:
            raise TierError(errno.EUCLEAN, str(member.error.strerror))
        elif full:
            if member.is_proof and not any(one.is_proof for one in served.members.values() if one is not member):
                # It would be left out for that: then nothing is served, and what clients have under way fails.
                raise TierError(
                    errno.EBUSY,
                    f"node {node} has the only leg of {mirror.name} that is up to date: there is none that it could be "
                    "compared with; wait for the resync of another one",
                )
            mirror.compared_in_full.add(leg.id)  # also of one that is away: when it is back
            if member.leg is not None:
                served.leg_failed(member.leg, OSError(errno.ECANCELED, "an operator wants it compared in full"))
        if member.kept_out is not None:
            member.error = member.kept_out = None  # else who follows the resync hears it before it is tried
            served.change()

    async def _discard(self, mirror: MirrorPart, leg: LegInfo) -> None:
        state = await self.mirrors.voter(leg.node).state(mirror.membership.mirror)
        theirs = max(
            (term.number for term in (state.promised, state.accepted and state.accepted.term) if term), default=0
        )
        if theirs >= mirror.membership.term.number:
            if isinstance(mirror, DisklessMirror):
                # It would take force, which only a node with a leg can use: this one would serve nothing any more.
                raise TierError(
                    errno.ENOTSUP,
                    f"node {leg.node} has had a term as late as this one, so a node with a leg has to decide that: "
                    f"`terrace volume mirror demote {mirror.name} --to NODE` with the one that is up to date, and "
                    "discard it there",
                )
            # Only a later term than theirs makes them let go; clients here are cut off for a moment.
            await mirror.begin_anew()
        mirror.compared_in_full.add(leg.id)
        asked = {"leg": leg.id, "membership": _plain(mirror.membership)}
        await self.mirrors.peers.call(leg.node, "leg.discard", asked, CREATE_S)
        served = mirror.mirror
        if served is not None and leg.id in served.members:
            served.members[leg.id].error = None  # else who follows the resync hears the reason that is gone now
            served.change()

    async def resize(self, mirror: MirrorPart, size_bytes: int) -> None:
        """Give all legs another size. Raises TierError ENOSPC for growing where the pool of a leg refuses it."""
        require_mirror_size(mirror.name, size_bytes)
        was_bytes = (await self.served(mirror)).size_bytes
        # Beside changes of its legs: it is another field of the record.
        async with self._one_at_a_time.changing(f"the size of {mirror.name}"):
            served = await self.served(mirror)
            await served.size_decided()
            if served.size_bytes not in (was_bytes, size_bytes):
                # It was judged by the size that it had: what was to grow it would shrink it now.
                raise TierError(
                    errno.EBUSY,
                    f"{mirror.name} has got another size meanwhile, {served.size_bytes} bytes: resize it again if that "
                    "isn't what it is to have",
                )
            if size_bytes < served.size_bytes:
                # The leg here would refuse it when the others have done it already.
                self.require_unused(mirror.stood_for, "shrink")
            else:
                await self._require_growth(mirror, served, size_bytes)
            await served.resize(size_bytes)

    async def _require_growth(self, mirror: MirrorPart, served: ServedMirror, size_bytes: int) -> None:
        """A leg that couldn't grow with the others would be left behind, and never come back at its size."""
        refusals: list[str] = []

        async def one(leg: LegInfo) -> None:
            asked = {"leg": leg.id, "size_bytes": size_bytes}
            try:
                if leg.node == self.mirrors.node:
                    self.mirrors.require_growth(leg.id, size_bytes)
                else:
                    await self.mirrors.peers.call(leg.node, "leg.may_grow", asked, FIND_S)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    return  # who can't say it now is found to be lost by the resize itself
                way_out = f"`terrace volume mirror remove {mirror.name} {leg.node}`"
                if leg.id == mirror.me:  # which can't be removed at its primary
                    way_out = f"`terrace volume mirror demote {mirror.name} --to NODE`, and remove this leg there"
                refusals.append(
                    f"the leg of {mirror.name} on node {leg.node} can't grow: {error.strerror}; or go on without that "
                    f"leg: {way_out}"
                )

        async with trio.open_nursery() as nursery:
            for leg in served.status().legs:
                if leg.info.kind == "terrace" and leg.state in (LegState.UP_TO_DATE, LegState.SYNCING):
                    nursery.start_soon(one, leg.info)
        if refusals:
            raise TierError(errno.ENOSPC, "; ".join(sorted(refusals)))

    async def verify(
        self, mirror: MirrorPart, progress: Callable[[int, int], None], *, full: bool, repair: bool
    ) -> dict[str, Any]:
        """Compare the legs in sync while clients go on. JSON: what differs, by node."""
        served = await self.served(mirror)
        report = VerifyReport()
        nodes = {leg.id: leg.place for leg in served.membership.legs}
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

        seen = served.status()
        found = {
            "volume": mirror.name,
            "full": full,
            "compared": [nodes.get(leg, leg) for leg in report.compared],
            "compared_bytes": report.done_bytes,
            "differing_bytes": report.differing_bytes,
            "repaired_bytes": report.repaired_bytes,
            "unreadable_bytes": report.unreadable_bytes,
            "healed_bytes": report.healed_bytes,
            "left_bytes": report.left_bytes,
            "differing": ranges(report.differing),
            "unreadable": ranges(report.unreadable),
            "map_damaged": ranges(report.map_damaged),
            "next_steps": [about_map(mirror.name, self.mirrors.node, seen, leg) for leg in report.map_damaged],
            "equal": report.equal,
        }
        if not report.equal:
            self.mirrors.tell("mirror", mirror.name, _found_by_verify(mirror.name, report))
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
            legs = [leg for leg in status["legs"] if leg["kind"] == "terrace"]  # no NBD server's can be promoted
            good = [leg["node"] for leg in legs if leg["state"] == LegState.UP_TO_DATE.value]
            last = last_leg_on(node, ((leg["node"], _leg_state(leg["state"])) for leg in legs))
            if last is not None:
                # What is out for a reason of its own isn't back by waiting.
                why = [f"the leg on node {leg['node']} is out: {leg['error']}" for leg in legs if leg["error"]]
                refused.append("; ".join([f"{mirror.name}: {last}", *why]))
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

    async def _require_arbiter(self, options: Options, name: str, what: str) -> None:
        """Else what needs a record would wait for it, and hold others up. Before anything is changed.

        `what` of the mirror `name` can't be done then. Raises OSError with a sentence.
        """
        if options.arbiter == "etcd":
            with _unchanged(name, what):
                await self.mirrors.arbiter.require()

    async def _arbiters(self, mirror: MirrorPart) -> Membership | None:
        """The arbiter's record; None if there is none, or no arbiter. Raises OSError."""
        membership = mirror.membership
        if membership.options.arbiter != "etcd":
            return None
        with _unchanged(mirror.name, "promoted"):
            try:
                return await self.mirrors.cluster(membership).newest(membership.mirror)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                return None

    async def _judge_places(self, places: Sequence[Place]) -> None:
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
            if place.is_nbd:
                self._judge_uri(place)
            else:
                self.mirrors.peers.peer(place.node)
            if any(one.node == place.node for one in places[:index]):
                raise TierError(errno.EINVAL, f"{_named(place)} is named twice: one leg in a place is what helps")
        marks = await self._exports.marks(place.node for place in places if place.is_nbd)
        for uri, other in itertools.combinations(marks, 2):
            if marks[uri] & marks[other]:
                raise TierError(errno.EINVAL, f"{other} is the export {uri}: one leg in a place is what helps")

    def _judge_uri(self, place: Place) -> None:
        """Raises TierError EINVAL, EPROTONOSUPPORT with a sentence."""
        try:
            parse_target(place.node)
        except OSError as error:
            raise TierError(error.errno or errno.EINVAL, error.strerror or str(error)) from None
        if place.pool:
            raise TierError(errno.EINVAL, f"{place.node}: an NBD server has no pools; name the export in the URI")

    def require_unused(self, volume: StoodFor, what: str) -> None:
        """Raises EBUSY with who is connected."""
        if volume.open_count:
            users = self._clients(volume.name)
            shown = named(users) if users else "clients"
            raise TierError(
                errno.EBUSY, f"can't {what} {volume.name}, which is in use by {shown}: disconnect them first"
            )


@contextmanager
def _unchanged(name: str, what: str) -> Iterator[None]:
    """The arbiter is asked in there, before anything is done to the mirror: an error says that, and the next step."""
    try:
        yield
    except OSError as error:
        raise TierError(
            error.errno or errno.EIO,
            f"{name} can't be {what} without its arbiter: {error.strerror or error}. Nothing has changed: see to etcd "
            "(`terrace status` shows whether it answers this node), then try again",
        ) from None


async def _which_count(served: ServedMirror, legs: Sequence[LegInfo]) -> tuple[set[str], set[str]]:
    """Of new legs, by id: those that the record has, and those that one may have of which nobody knows if it counts.

    While the mirror is served that is found out soon: its next record, without them, comes after all that were tried.
    """
    wanted = {leg.id for leg in legs}

    def tried() -> set[str]:
        return {leg.id for attempt in served.records.attempts for leg in attempt.legs}

    with trio.move_on_after(DOUBT_S):
        while wanted & tried() and not served.ended.is_set():
            await served.changed()
    counts = wanted & {leg.id for leg in served.membership.legs}
    return counts, (wanted & tried()) - counts


def _found_by_verify(name: str, report: VerifyReport) -> str:
    """Of legs that aren't equal, or can't be read."""
    unreadable = f"{report.unreadable_bytes} bytes can't be read, {report.healed_bytes} of them were healed"
    if not report.differing_bytes:
        return f"not all of the legs of {name} can be read, and nothing that can be differs: {unreadable}"
    what = f"{report.differing_bytes} bytes differ, {report.repaired_bytes} of them were repaired"
    return f"the legs of {name} are not equal: {what}" + (f"; {unreadable}" if report.unreadable_bytes else "")


def _last_record(served: ServedMirror) -> Membership:
    """The last one that was written: legs may have it, whether it has counted or not, and obey none that is older."""
    return max([served.membership, *served.records.attempts], key=lambda record: record.epoch)


def _legs_by_any(mirror: MirrorPart) -> list[LegInfo]:
    """Of a mirror, by its record here and by those of which it isn't known whether they count."""
    records = [mirror.accepted] if mirror.accepted is not None else []
    if mirror.mirror is not None:
        records += [mirror.mirror.membership, *mirror.mirror.records.attempts]
    return [leg for record in records for leg in record.legs]


def _may_have_others(mirror: LocalMirror) -> bool:
    """Whether a record of it that counts, or may, has more than the leg here."""
    records = [mirror.membership]
    if mirror.mirror is not None:
        records += mirror.mirror.records.attempts
    return any(len(record.legs) > 1 for record in records)


def _in_doubt(name: str, legs: Sequence[LegInfo]) -> str:
    nodes = ", ".join(leg.node for leg in legs)
    exports = ", ".join(f"{leg.export} on {leg.node}" for leg in legs)
    return (
        f"whether {name} has a leg on {nodes} now is not known yet, so nothing was deleted: `terrace volume mirror "
        f"list` shows it when the mirror is served again; if it has none, delete {exports} with `terrace volume delete "
        "--force`"
    )


def _leg_state(said: Any) -> LegState:
    """Of a status, which may be a peer's: what isn't understood is nothing to rely on."""
    try:
        return LegState(said)
    except ValueError:
        return LegState.OFFLINE


def _plain(membership: Membership) -> Any:
    return json.loads(encode(membership))


def _nodes(places: Sequence[Place]) -> str:
    return ", ".join(place.node for place in places)


def _still_there(node: str, export: str, why: str, *, snapshots: bool) -> str:
    more = " --snapshots" if snapshots else ""
    return f"{export} on node {node} is still there ({why}); on that node: terrace volume delete {export} --force{more}"


def _not_told(node: str, why: str) -> str:
    return (
        f"node {node} couldn't be told that it is no tie-breaker any more ({why}): it keeps a small file for it, which "
        "does no harm; the same command tells it again"
    )


def _identity(mirror: MirrorPart) -> str:
    """For `RemovedLegs`: a volume of that name that is made later is another one."""
    return _volume_identity(mirror.pool, mirror.volume) if isinstance(mirror, LocalMirror) else f"none/{mirror.name}"


def _volume_identity(pool: Pool, volume: Volume) -> str:
    return f"{pool.uuid}/{volume.family}"


def _written(place: Place) -> str:
    """As the command line has it."""
    return f"{place.node}/{place.pool}" if place.pool else place.node


def _is_same(leg: LegInfo, place: Place) -> bool:
    """Whether there is such a leg already; an export may be named by several URIs."""
    if leg.kind == "terrace" or not place.is_nbd:
        return leg.place == place.node
    return export_of(leg.export) == export_of(place.node)


def _named(place: Place) -> str:
    return place.node if place.is_nbd else f"node {place.node}"


def require_mirror_size(name: str, size_bytes: int) -> None:
    """Raises TierError EINVAL for a size that no volume may have, or that ends within a block: a leg gets whole ones.

    Legs refuse both, and a record of such a size would leave none of them good.
    """
    if size_bytes % BLOCK_BYTES:
        above = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        raise TierError(
            errno.EINVAL,
            f"{name} can't be mirrored with {size_bytes} bytes: the size of a mirror is a multiple of {BLOCK_BYTES}, "
            f"such as {above}",
        )
    validate_volume_size(size_bytes)


def _with_others(legs: int) -> str:
    """` with its 2 other legs`; empty without one."""
    return f" with its {'other leg' if legs == 1 else f'{legs} other legs'}" if legs else ""
