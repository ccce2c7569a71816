"""Snapshots through mirrors: taken, deleted, renamed and held at the primary, on all legs.

**Taking** goes to every leg in sync, at one place in the order of writes (`replication.snapshots`); a group may have
plain volumes too, which are taken while all its mirrors stand still. A leg that isn't in sync, or refuses, lacks that
snapshot for good: a copy of it made later would have to be proven, and nothing pretends to be one.

**Deleting** asks all legs first: one that is held or in use anywhere is deleted nowhere. A leg that is away owes the
deletion, which the primary remembers (`terrace.duedeletions`) and has done as soon as its node is heard.

**A node that isn't primary** refuses all of these, naming the primary; `local` says that the leg here alone is meant,
as for keeping what is on it before `resync --discard`. Its schedule rests, too.

**What legs have** is asked of their nodes (`snapshots.list`), for lists and for the schedule, which lets expire on each
leg what that leg has too much of. Calls that change something carry the primary's term, and a node that has promised a
later one refuses them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

import trio

from replication.membership import LegInfo, Term
from replication.mirror import Mirror
from replication.snapshots import take_at_once
from terrace.duedeletions import Due, DueDeletions, holds
from terrace.keptstate import is_kept_state
from terrace.localmirror import LocalMirror
from terrace.mirrors import Mirrors
from terrace.peers import Handler
from terrace.primary import MirrorPart, ServedMirror
from terrace.snapshots import Lacking
from tiers import Pool, SnapshotStatus, TierError, Volume
from tiers.names import validate_name

log = logging.getLogger("terraced")

ASK_S: Final = 3.0
CHANGE_S: Final = 30.0
TICK_S: Final = 1.0
PAGE: Final = 4000
"""So many snapshots in one answer, which has at most 1 MiB."""


@dataclass
class Elsewhere:
    """A snapshot on another node's leg. Implements `terrace.schedule.Kept`."""

    short_name: str
    created_at: float
    size_bytes: int
    held: bool
    open_count: int


@dataclass(frozen=True)
class OnLegs:
    """Where the snapshots of one mirror are: names by node, None of a node that can't be asked."""

    here: str
    names: Mapping[str, Mapping[str, Elsewhere] | None]

    def of(self, name: str, *, is_here: bool) -> dict[str, list[str]]:
        """Nodes: {on, missing, unknown}. JSON."""
        on, missing = ([self.here], []) if is_here else ([], [self.here])
        unknown: list[str] = []
        for node, names in self.names.items():
            (unknown if names is None else on if name in names else missing).append(node)
        return {"on": on, "missing": missing, "unknown": unknown}


class MirrorSnapshots:
    """See the module. `run` has to be run; implements `terrace.snapshots.Through`. Every refusal is a TierError."""

    def __init__(self, mirrors: Mirrors, due: DueDeletions) -> None:
        self._mirrors = mirrors
        self._due = due
        self._settling = trio.Lock()
        self._going: list[tuple[str, str]] = []
        """Volumes' names and their snapshots' that are being deleted: what legs owe of that isn't written down yet."""

    # -- who does it ---------------------------------------------------------------------------------------------

    def is_mine(self, volume: Volume) -> bool:
        """Whether a schedule of this node is for that volume now.

        Not while another node serves it, nor while its writes wait, since all that are due are taken at one instant.
        What was missed is made up for afterwards.
        """
        if not volume.mirror_record:
            return True
        try:
            mirror = self._mirrors.of(volume)
        except OSError:
            return False
        if mirror is None or not mirror.serves or mirror.mirror is None:
            return False
        return not mirror.mirror.lost and not mirror.mirror.excluding

    def _leg_of(self, volume: Volume) -> LocalMirror | None:
        """The mirror of a volume; None of a plain one."""
        mirror = self._mirrors.of(volume)
        if mirror is None and volume.mirror_record:
            raise TierError(errno.EBUSY, f"{volume.name} is a leg of a mirror that is being started or stopped")
        return mirror

    async def _served(self, mirror: LocalMirror, what: str) -> ServedMirror:
        """The mirror that this node is primary of. Raises EBUSY that names the one that is."""
        if not mirror.serves and mirror.starting:
            await mirror.serving()
        if mirror.serves:
            assert mirror.mirror is not None
            await trio.lowlevel.checkpoint()
            return mirror.mirror
        primary = mirror.membership.primary
        if primary in (None, self._mirrors.node):
            where = f"has no primary now: `terrace volume mirror promote {mirror.name}` makes this node the primary"
        else:
            where = f"has node {primary} as its primary: do it there, for all legs"
        raise TierError(
            errno.EBUSY, f"{mirror.name} is a leg of a mirror that {where}; --local {what} on the leg here only"
        )

    # -- taking --------------------------------------------------------------------------------------------------

    async def take(
        self,
        pool: Pool,
        wanted: Sequence[tuple[str, str]],
        *,
        by_filler: bool = False,
        local: bool = False,
        force: bool = False,
    ) -> Lacking:
        """Snapshots (volume, name) of one instant, on every leg in sync: all, or none. Tells who lacks them."""
        for volume, name in wanted:
            validate_name("snapshot", name)
            found = pool.volume(volume)
            _require_own_name(found, name)
            if (found.name, name) in self._going:
                # Who is found to be away would get it now, and delete it as what it owes.
                raise TierError(
                    errno.EBUSY, f"{found.name}@{name} is being deleted at this moment: try again when that has ended"
                )
        if len({volume for volume, _ in wanted}) < len(wanted):
            raise TierError(errno.EINVAL, "a volume is named twice: one snapshot of it is enough")
        plain: list[tuple[str, str]] = []
        served: dict[ServedMirror, tuple[str, str]] = {}
        for volume, name in wanted:
            mirror = self._leg_of(pool.volume(volume))
            if mirror is None:
                plain.append((volume, name))
            elif local:
                self._judge_local(mirror, force=force)
                plain.append((volume, name))
            else:
                served[await self._served(mirror, "takes one")] = (volume, name)

        async def here(in_sync: Sequence[Mirror]) -> None:
            own = [*plain, *(served[cast(ServedMirror, one)] for one in in_sync)]
            if own:
                await pool.take_snapshots(own, by_filler=by_filler)

        try:
            async with contextlib.AsyncExitStack() as stack:
                # What these legs have of that name is refused there; what they get now must not be deleted later, nor
                # by what is being deleted in this moment.
                owed = [
                    (due, primary, name)
                    for primary, (_, name) in served.items()
                    for due in self._due.of(primary.membership.mirror)
                    if name in due.names
                ]
                if owed:
                    await stack.enter_async_context(self._settling)
                for due, primary, name in owed:
                    if due.leg in primary.membership.in_sync:
                        await self._due.drop(due.mirror, due.leg, [name])
                taken = await take_at_once({primary: name for primary, (_, name) in served.items()}, here)
                for due, primary, name in owed:
                    if primary.membership.has(due.leg) and due.leg not in taken[primary]:
                        await self._forget(due, [name])  # it has come back in between
        except TierError:
            raise
        except OSError as error:
            raise TierError(error.errno or errno.EIO, error.strerror or str(error)) from None
        lacking: dict[str, dict[str, str]] = {}
        for primary, (volume, _) in served.items():
            # Those on NBD servers never have any, and aren't told of by the node that added them.
            nodes = {leg.id: leg.node for leg in primary.membership.legs if leg.kind == "terrace"}
            lacking[volume] = {nodes[leg]: why for leg, why in taken[primary].items() if leg in nodes}
        return lacking

    @staticmethod
    def _judge_local(mirror: LocalMirror, *, force: bool) -> None:
        if not force and not mirror.serves and mirror.keeper.record.inconsistent:
            kept = mirror.kept_state()
            step = f"its last consistent state is {kept}" if kept else "--force takes one nevertheless"
            raise TierError(
                errno.EBUSY,
                f"the leg {mirror.name} here is being brought up to date, so it is no state that the volume ever had: "
                + step,
            )

    # -- deleting, renaming, holding -----------------------------------------------------------------------------

    async def delete(
        self, pool: Pool, wanted: Sequence[tuple[str, str]], *, local: bool = False, remember: bool = True
    ) -> list[str]:
        """Delete snapshots (volume, name) on all legs. A sentence for each leg that is left, and owes it.

        `remember`: legs that are away are told when they are back. Raises TierError: ENOENT, EBUSY.
        """
        going = [(pool.volume(volume).name, name) for volume, name in wanted]
        self._going += going
        try:
            return await self._delete(pool, wanted, local=local, remember=remember)
        finally:
            for one in going:
                self._going.remove(one)

    async def _delete(self, pool: Pool, wanted: Sequence[tuple[str, str]], *, local: bool, remember: bool) -> list[str]:
        own: list[tuple[str, str]] = []
        elsewhere: dict[ServedMirror, dict[str, set[str]]] = {}
        """By leg: the names there."""
        away: dict[ServedMirror, dict[str, set[str]]] = {}
        for volume, names in _by_volume(wanted).items():
            found = pool.volume(volume)
            there = {one.short_name for one in pool.snapshots(volume)}
            mirror = self._leg_of(found)
            through = {name for name in names if mirror is not None and not local and not is_kept_state(name)}
            if not through:
                own += [(volume, name) for name in names]
                continue
            assert mirror is not None
            served = await self._served(mirror, "deletes it")
            states = await self._ask(served)
            missing = set(names) - there
            for leg, snapshots in states.items():
                if snapshots is None:
                    away.setdefault(served, {}).setdefault(leg.id, set()).update(through)
                    continue
                for name in through & snapshots.keys():
                    self._require_free(f"{found.name}@{name}", leg.node, snapshots[name])
                    elsewhere.setdefault(served, {}).setdefault(leg.id, set()).add(name)
                missing -= through & snapshots.keys()
            own += [(volume, name) for name in names if name in there or name in missing]
        if own:
            await pool.delete_snapshots(own)
        return await self._delete_elsewhere(elsewhere, away, remember=remember)

    async def _delete_elsewhere(
        self,
        elsewhere: Mapping[ServedMirror, Mapping[str, set[str]]],
        away: Mapping[ServedMirror, dict[str, set[str]]],
        *,
        remember: bool,
    ) -> list[str]:
        left: list[str] = []
        owed: list[tuple[ServedMirror, str, set[str], str]] = [
            (mirror, leg, names, "can't be reached") for mirror, legs in away.items() for leg, names in legs.items()
        ]

        async def one(mirror: ServedMirror, leg: str, names: set[str]) -> None:
            try:
                kept = await self.delete_on(mirror, leg, sorted(names))
            except OSError as error:
                owed.append((mirror, leg, names, error.strerror or str(error)))
            else:
                left.extend(f"{name} stays on node {_node(mirror, leg)}: {why}" for name, why in kept.items())

        async with trio.open_nursery() as nursery:
            for mirror, legs in elsewhere.items():
                for leg, names in legs.items():
                    nursery.start_soon(one, mirror, leg, names)
        for mirror, leg, names, why in owed:
            node, record = _node(mirror, leg), mirror.membership
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            if not remember:
                continue
            for earlier in self._due.of(record.mirror):
                # An earlier name that means something else by now isn't to get the place of what is added.
                if earlier.leg == leg and not holds(earlier, record, self._mirrors.node):
                    await self._let_be(mirror, earlier)
            await self._due.add(Due(record.mirror, leg, node, record.term, record.epoch, tuple(sorted(names))))
            left.append(f"node {node} ({why}) deletes {shown} of {mirror.name}, if it has it, when it is back")
        return sorted(left)

    async def delete_on(self, mirror: ServedMirror, leg: str, names: Sequence[str]) -> dict[str, str]:
        """On one other leg; what isn't there is no error. Tells what stays, by name, and why. Raises OSError."""
        kept: dict[str, str] = {}
        for start in range(0, len(names), PAGE):
            term = mirror.membership.term
            asked = {"leg": leg, "term": [term.number, term.id], "names": list(names[start : start + PAGE])}
            answer = await self._mirrors.peers.call(_node(mirror, leg), "snapshots.delete", asked, CHANGE_S)
            kept |= {str(name): str(why) for name, why in dict(answer["kept"]).items()}
        return kept

    @staticmethod
    def _require_free(name: str, node: str, one: Elsewhere) -> None:
        if one.held:
            raise TierError(errno.EBUSY, f"{name} is held on node {node}: `terrace snapshot release {name}` first")
        if one.open_count:
            raise TierError(
                errno.EBUSY, f"{name} is in use on node {node} by {one.open_count} clients: disconnect them"
            )

    async def change(
        self,
        pool: Pool,
        volume: str,
        name: str,
        *,
        new_name: str | None = None,
        held: bool | None = None,
        local: bool = False,
    ) -> list[str]:
        """Rename, hold or release a snapshot on all legs. A sentence for each leg where a hold isn't changed."""
        found = pool.volume(volume)
        if new_name is not None:
            _require_own_name(found, new_name)
        mirror = self._leg_of(found)
        if mirror is None or local:
            await pool.change_snapshot(volume, name, new_name=new_name, held=held)
            return []
        served = await self._served(mirror, "changes it")
        states = await self._ask(served)
        pool.snapshot(volume, name)
        away = sorted(leg.node for leg, snapshots in states.items() if snapshots is None)
        if new_name is not None and new_name != name:
            if away:
                raise TierError(
                    errno.EBUSY,
                    f"{found.name}@{name} can't be renamed while node {', '.join(away)} is away, which may have it "
                    "too: try again when it is back",
                )
            if any(one.short_name == new_name for one in mirror.volume_snapshots()):
                raise TierError(
                    errno.EEXIST,
                    f"there is a snapshot {found.name}@{new_name} already: choose another name, or delete it first",
                )
            taken = [leg.node for leg, snapshots in states.items() if snapshots and new_name in snapshots]
            if taken:
                raise TierError(
                    errno.EEXIST,
                    f"there is a snapshot {found.name}@{new_name} on node {', '.join(taken)} already: choose another",
                )
        await pool.change_snapshot(volume, name, new_name=new_name, held=held)
        left = [f"node {node} is away, and may have it as it was" for node in away]
        for leg, snapshots in states.items():
            if snapshots is None or name not in snapshots:
                continue
            term = served.membership.term
            asked = {"leg": leg.id, "term": [term.number, term.id], "name": name, "new_name": new_name, "held": held}
            try:
                await self._mirrors.peers.call(leg.node, "snapshots.change", asked, CHANGE_S)
            except OSError as error:
                left.append(f"node {leg.node} has it as it was: {error.strerror or error}")
        return left

    def require_plain(self, volume: Volume, done: str, instead: str) -> None:
        """Refuse what would change one leg only. Raises TierError EBUSY with the next step."""
        if volume.mirror_record:
            raise TierError(errno.EBUSY, f"{volume.name} is mirrored and can't be {done}: {instead}")

    # -- what legs have ------------------------------------------------------------------------------------------

    async def where(self, pool: Pool, volume: str) -> OnLegs | None:
        """Where the snapshots of a mirrored volume are; None of a plain one. Any node may ask."""
        try:
            mirror = self._mirrors.of(pool.volume(volume))
        except OSError:
            mirror = None
        if mirror is None:
            await trio.lowlevel.checkpoint()
            return None
        return OnLegs(self._mirrors.node, {leg.node: names for leg, names in (await self._ask(mirror)).items()})

    async def counted(self, mirror: MirrorPart) -> dict[str, dict[str, int]]:
        """By node that can be asked: how many snapshots its leg has, and how many it lacks that others have. JSON.

        Empty where this node has no leg.
        """
        if not isinstance(mirror, LocalMirror):
            return {}
        found: dict[str, set[str]] = {self._mirrors.node: {one.short_name for one in mirror.volume_snapshots()}}
        try:
            found |= {leg.node: set(names) for leg, names in (await self._ask(mirror)).items() if names is not None}
        except OSError:
            return {}
        everything = set().union(*found.values())
        return {
            node: {"snapshots": len(names), "lacking_snapshots": len(everything - names)}
            for node, names in found.items()
        }

    async def elsewhere(self, pool: Pool, volume: str) -> dict[str, list[Elsewhere]]:
        """By id, the other legs that can be asked, of a mirror that this node is primary of: what they have."""
        mirror = self._leg_of(pool.volume(volume))
        if mirror is None or not mirror.serves:
            await trio.lowlevel.checkpoint()
            return {}
        found = await self._ask(mirror)
        return {leg.id: list(names.values()) for leg, names in found.items() if names is not None}

    async def expire(self, pool: Pool, volume: str, leg: str, names: Sequence[str]) -> None:
        """Delete on one other leg what it has too much of. Raises OSError."""
        mirror = self._leg_of(pool.volume(volume))
        if mirror is not None and mirror.serves:
            assert mirror.mirror is not None
            await self.delete_on(mirror.mirror, leg, names)

    async def _ask(self, mirror: LocalMirror | ServedMirror) -> dict[LegInfo, dict[str, Elsewhere] | None]:
        """What each other Terrace leg has; None of one that doesn't answer. Oldest first."""
        others = [leg for leg in mirror.membership.legs if leg.node != self._mirrors.node and leg.kind == "terrace"]
        found: dict[LegInfo, dict[str, Elsewhere] | None] = dict.fromkeys(others)

        async def one(leg: LegInfo) -> None:
            try:
                with trio.fail_after(ASK_S):
                    found[leg] = await self._list(leg)
            except (OSError, trio.TooSlowError, KeyError, TypeError, ValueError) as error:
                log.debug("the snapshots of %s on node %s aren't known: %s", leg.export, leg.node, error)

        async with trio.open_nursery() as nursery:
            for leg in others:
                nursery.start_soon(one, leg)
        return found

    async def _list(self, leg: LegInfo) -> dict[str, Elsewhere]:
        found: dict[str, Elsewhere] = {}
        while True:
            asked = {"leg": leg.id, "from": len(found)}
            answer = await self._mirrors.peers.call(leg.node, "snapshots.list", asked, ASK_S)
            page = list(answer["snapshots"])
            for name, created_at, size, held, open_count in page:
                found[str(name)] = Elsewhere(str(name), float(created_at), int(size), bool(held), int(open_count))
            if not page or not answer["more"]:
                return {name: one for name, one in found.items() if not is_kept_state(name)}

    # -- what other nodes ask ------------------------------------------------------------------------------------

    def handlers(self) -> Mapping[str, Handler]:
        """What peers may call."""
        return {
            "snapshots.list": self._tell_list,
            "snapshots.delete": self._delete_here,
            "snapshots.change": self._change_here,
        }

    def _mirror_with(self, params: dict[str, Any], *, by_primary: bool) -> LocalMirror:
        mirror = self._mirrors.by_leg(str(params.get("leg")))
        if mirror is None:
            raise OSError(errno.ENOENT, f"node {self._mirrors.node} has no such leg open")
        if by_primary:
            try:
                number, term_id = params["term"]
                term = Term(int(number), str(term_id))
            except (KeyError, TypeError, ValueError):
                raise OSError(errno.EINVAL, "term is missing in what a node has asked") from None
            if mirror.serves or not mirror.keeper.allows(term):
                raise OSError(errno.ESTALE, f"{mirror.name} on node {self._mirrors.node} is of a later term")
        return mirror

    async def _tell_list(self, node: str, params: dict[str, Any]) -> Any:
        mirror = self._mirror_with(params, by_primary=False)
        await trio.lowlevel.checkpoint()
        start = params.get("from", 0)
        if type(start) is not int or start < 0:
            raise OSError(errno.EINVAL, "from is no number")
        snapshots = mirror.pool.snapshots(mirror.volume.short_name)
        page = snapshots[start : start + PAGE]
        rows = [[one.short_name, one.created_at, one.size_bytes, one.held, one.open_count] for one in page]
        return {"snapshots": rows, "more": start + len(page) < len(snapshots)}

    async def _delete_here(self, node: str, params: dict[str, Any]) -> Any:
        mirror = self._mirror_with(params, by_primary=True)
        names = params.get("names")
        if type(names) is not list:
            raise OSError(errno.EINVAL, "names are missing in what a node has asked")
        pool, volume = mirror.pool, mirror.volume.short_name
        there = {one.short_name: one for one in pool.snapshots(volume)}
        kept: dict[str, str] = {}
        going: list[tuple[str, str]] = []
        for name in names:
            one = there.get(name)
            if one is None:
                continue
            if one.held or one.open_count:
                kept[name] = "it is held" if one.held else "it is in use"
            else:
                going.append((volume, name))
        if going:
            with self._mirrors.pools.using(pool.name):
                await pool.delete_snapshots(going)
            log.info("%s: %d snapshots were deleted by order of node %s", mirror.name, len(going), node)
        return {"kept": kept}

    async def _change_here(self, node: str, params: dict[str, Any]) -> Any:
        mirror = self._mirror_with(params, by_primary=True)
        name, new_name, held = params.get("name"), params.get("new_name"), params.get("held")
        if type(name) is not str or type(new_name) not in (str, type(None)) or type(held) not in (bool, type(None)):
            raise OSError(errno.EINVAL, "a node has asked for a change of a snapshot that can't be understood")
        with self._mirrors.pools.using(mirror.pool.name) as pool:
            await pool.change_snapshot(mirror.volume.short_name, name, new_name=new_name, held=held)
        return {}

    # -- what is due ---------------------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """The task: have legs that are back delete what they owe."""
        while True:
            await trio.sleep(TICK_S)
            if self._due:
                for mirror in self._mirrors.all():
                    if mirror.serves and mirror.mirror is not None:
                        await self._settle(mirror.mirror)

    async def _settle(self, mirror: ServedMirror) -> None:
        for due in self._due.of(mirror.membership.mirror):
            if not mirror.membership.has(due.leg):
                await self._forget(due)
            elif not holds(due, mirror.membership, self._mirrors.node):
                await self._let_be(mirror, due)
            else:
                async with self._settling:
                    names = [name for one in self._due.of(due.mirror) if one.leg == due.leg for name in one.names]
                    try:
                        kept = await self.delete_on(mirror, due.leg, names)
                    except (OSError, KeyError, TypeError, ValueError):
                        continue  # it is still away
                    await self._forget(due, names)
                for name, why in kept.items():
                    self._mirrors.tell(
                        "mirror", mirror.name, f"{mirror.name}@{name} was deleted and stays on node {due.node}: {why}"
                    )

    async def _let_be(self, mirror: ServedMirror, due: Due) -> None:
        """Names of before another node was primary: they may be of other snapshots now."""
        try:
            # What was asked for since then, of a leg that is still away, is due nevertheless.
            await self._due.drop(due.mirror, due.leg, only=due)
        except OSError as error:
            log.warning("what %s owes can't be written down: %s", due.node, error)
        shown = ", ".join(due.names[:5]) + (", ..." if len(due.names) > 5 else "")
        self._mirrors.tell(
            "mirror",
            mirror.name,
            f"{shown} of {mirror.name} may be left on node {due.node}, which was away when it was deleted, as "
            "another node was primary since; terrace snapshot list shows it",
        )

    async def _forget(self, due: Due, names: Sequence[str] | None = None) -> None:
        try:
            await self._due.drop(due.mirror, due.leg, names)
        except OSError as error:
            log.warning("what %s owes can't be written down: %s", due.node, error)


async def listed(
    through: MirrorSnapshots, pool: Pool, volumes: Sequence[str], found: Sequence[SnapshotStatus]
) -> list[dict[str, Any]]:
    """Rows of snapshots with `legs`, None of plain volumes: those here, and those that only other legs have. JSON."""
    asked: dict[str, OnLegs | None] = {}

    async def ask(volume: str) -> None:
        asked[volume] = await through.where(pool, volume)

    async with trio.open_nursery() as nursery:
        for volume in volumes:
            nursery.start_soon(ask, volume)
    rows: list[dict[str, Any]] = []
    for one in found:
        on_legs = asked.get(one.volume.partition("/")[2])
        legs = None if on_legs is None or is_kept_state(one.snapshot) else on_legs.of(one.snapshot, is_here=True)
        rows.append(dataclasses.asdict(one) | {"legs": legs})
    here = {one.name for one in found}
    for volume, on_legs in asked.items():
        names = (
            {}
            if on_legs is None
            else {name: one for there in on_legs.names.values() for name, one in (there or {}).items()}
        )
        for name, elsewhere in names.items():
            full_name = f"{pool.name}/{volume}@{name}"
            if full_name not in here:
                assert on_legs is not None
                rows.append(_row_elsewhere(full_name, elsewhere, on_legs.of(name, is_here=False)))
    return rows


def _row_elsewhere(full_name: str, one: Elsewhere, legs: dict[str, list[str]]) -> dict[str, Any]:
    """As a row of `SnapshotStatus`; what only the node that has it could count is None."""
    volume, _, name = full_name.partition("@")
    unknown = dict.fromkeys(("id", "referenced_bytes", "exclusive_bytes", "shared_bytes"))
    known = {"name": full_name, "volume": volume, "snapshot": name, "size_bytes": one.size_bytes}
    rest = {"created_at": one.created_at, "held": one.held, "open_count": one.open_count, "clones": []}
    return known | unknown | rest | {"legs": legs}


def _require_own_name(volume: Volume, name: str) -> None:
    """Whether a snapshot may be called so by people. Raises EINVAL."""
    if is_kept_state(name) and volume.mirror_record:
        raise TierError(errno.EINVAL, f"{name!r} is a name that resyncs give, and delete: choose another one")


def _node(mirror: ServedMirror, leg: str) -> str:
    return mirror.membership.leg(leg).node


def _by_volume(wanted: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for volume, name in wanted:
        found.setdefault(volume, []).append(name)
    return found
