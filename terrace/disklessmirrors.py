"""The mirrors that this node takes part in without a leg: found in the home at start, taken up and let go by operators.

Their names must not be those of volumes here: the part before the slash is no pool of this node. So a name says by
itself what it is of, and a pool that comes later hides the mirror (`at` doesn't find it) until one of the two is
renamed; what creates pools asks first (`require_free`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import trio

from replication.membership import Membership
from replication.voters import KeptVoter
from terrace.diskless import DIRECTORY, DisklessMirror, Participation, participation, path_of, require_name
from terrace.pools import Pools
from terrace.primary import MirrorPart, Surroundings, nodes_of
from tiers import TierError

log = logging.getLogger("terraced")

Live = Callable[[MirrorPart], Awaitable[None]]


class DisklessMirrors:
    """See the module. `start` is given a nursery in which they live."""

    def __init__(self, pools: Pools, home: Path, node: Surroundings, live: Live) -> None:
        self._pools = pools
        self._home = home
        self._node = node
        self._live = live
        self._mirrors: dict[str, DisklessMirror] = {}
        """By name."""
        self._nursery: trio.Nursery | None = None
        self._taking = trio.Lock()

    @property
    def _voter(self) -> KeptVoter:
        return self._node.own_voter

    async def start(self, nursery: trio.Nursery) -> None:
        """Those of the home begin. What can't be understood is told of, and left as it is."""
        self._nursery = nursery
        for path in await trio.to_thread.run_sync(_files, self._home / DIRECTORY):
            try:
                found = Participation.decode(await trio.to_thread.run_sync(path.read_bytes))
                if path.stem != found.membership.mirror:
                    raise OSError(errno.EPROTO, f"it is of the mirror {found.membership.mirror}")
                if not self._node.peers.node:
                    raise OSError(errno.EINVAL, "this node has no name any more: set name under [node] to what it was")
                if found.name in self._mirrors:
                    raise OSError(errno.EEXIST, f"another mirror has the name {found.name} here")
                await self._adopt(DisklessMirror(self._home, found, self._node))
            except OSError as error:
                why = error.strerror or str(error)
                self._node.tell("mirror", str(path), f"{path} can't be used: {why}; the mirror isn't served from here")
                log.error("%s can't be used: %s", path, why)
                continue
            if (shadow := self._shadow(found.name)) is not None:
                self._node.tell("mirror", found.name, f"the mirror {found.name} can't be reached here: {shadow}")

    async def _adopt(self, mirror: DisklessMirror) -> None:
        assert self._nursery is not None
        await mirror.begin()
        self._mirrors[mirror.name] = mirror
        self._nursery.start_soon(self._live, mirror)

    async def close(self) -> None:
        """All end, cleanly; they go on at the next start."""
        async with trio.open_nursery() as nursery:
            for mirror in self.all():
                nursery.start_soon(mirror.close)

    # -- what there is -------------------------------------------------------------------------------------------

    def all(self) -> list[DisklessMirror]:
        """By name."""
        return [self._mirrors[name] for name in sorted(self._mirrors)]

    def at(self, pool: str, volume: str) -> DisklessMirror | None:
        """The one of that name, unless a pool here has its first part."""
        return None if self._has_pool(pool) else self._mirrors.get(f"{pool}/{volume}")

    def named(self, name: str) -> DisklessMirror | None:
        """As `at`, of POOL/VOL."""
        pool, _, volume = name.partition("/")
        return self.at(pool, volume)

    def by_name(self, name: str) -> DisklessMirror | None:
        """Also one that a pool here hides."""
        return self._mirrors.get(name)

    def in_pool(self, pool: str) -> list[DisklessMirror]:
        """Those whose name begins so, by name; none if a pool here is called so."""
        if self._has_pool(pool):
            return []
        return [mirror for mirror in self.all() if mirror.name.partition("/")[0] == pool]

    def exported(self) -> Iterator[DisklessMirror]:
        """Those that clients may have, or may have in a moment."""
        for mirror in self.all():
            if (mirror.serves or mirror.starting) and self.named(mirror.name) is mirror:
                yield mirror

    def pools(self) -> list[str]:
        """The first parts of their names, where no pool here is called so."""
        names = {mirror.name.partition("/")[0] for mirror in self.all()}
        return sorted(name for name in names if not self._has_pool(name))

    def of_mirror(self, mirror_id: str) -> DisklessMirror | None:
        """By the mirror's id."""
        return next((one for one in self._mirrors.values() if one.mirror_id == mirror_id), None)

    def _has_pool(self, name: str) -> bool:
        return any(slot.name == name for slot in self._pools.slots())

    def _shadow(self, name: str) -> str | None:
        pool = name.partition("/")[0]
        if not self._has_pool(pool):
            return None
        return (
            f"this node has a pool {pool} itself: let the mirror go with `terrace volume mirror forget {name}`, and "
            f"promote this node anew with --as POOL/VOL, another name"
        )

    def require_free(self, pool: str) -> None:
        """Before a pool of that name is made. Raises EEXIST."""
        if used := self.in_pool(pool):
            raise TierError(
                errno.EEXIST,
                f"this node serves the mirror {used[0].name} without a leg, and so can't have a pool {pool!r}: choose "
                f"another name, or let it go with `terrace volume mirror demote {used[0].name}`",
            )

    # -- taking part ---------------------------------------------------------------------------------------------

    def judge(self, name: str, membership: Membership, *, asked_by: str = "") -> None:
        """Whether this node could take part under that name. Raises OSError EINVAL, EEXIST, ENOENT with a sentence.

        `asked_by`: a node that would hand it over, and calls it `name`; empty if this node is to be promoted.
        """
        pool, _ = require_name(name)
        node = self._node.peers.node
        if not node:
            raise TierError(
                errno.EINVAL,
                "this node has no name, so it can't serve a mirror: set name under [node] in the configuration, and "
                "the other nodes under [peers.NAME]",
            )
        path_of(self._home, membership.mirror)
        if membership.legs_on(node):
            raise TierError(
                errno.EINVAL,
                f"node {node} has a leg of that mirror: promote that, with `terrace volume mirror promote POOL/VOL` "
                "and without --from; `terrace pool list` says why it may not be open",
            )
        there = self.of_mirror(membership.mirror)
        if there is not None and there.name != name:
            way_out = _under(name, there.name, node, asked_by) if asked_by else "use that name"
            where = f"on node {node}" if asked_by else "here"
            raise TierError(errno.EEXIST, f"this mirror is known {where} as {there.name} already: {way_out}")
        if there is None and self._has_pool(pool):
            raise TierError(
                errno.EEXIST,
                f"node {node} has a pool {pool} itself, so it can't serve a mirror of other nodes as {name}: "
                f"{_under(name, 'POOL/VOL', node, asked_by)}, a name whose first part is no pool there",
            )
        if there is None and name in self._mirrors:
            raise TierError(
                errno.EEXIST,
                f"node {node} has another mirror that is called {name} there: "
                f"{_under(name, 'POOL/VOL', node, asked_by)}",
            )
        for other in nodes_of(membership.legs):
            self._node.peers.peer(other)

    async def promote(self, name: str, membership: Membership, *, force: bool) -> DisklessMirror:
        """Be the primary of that mirror, under that name. Nothing is left behind where it is refused. Idempotent."""
        async with self._taking:
            self.judge(name, membership)
            mirror = self.of_mirror(membership.mirror)
            known = mirror is not None
            if mirror is None:
                mirror = DisklessMirror(self._home, participation(name, membership, self._node.peers.node), self._node)
                await mirror.keep()
                try:
                    await self._adopt(mirror)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await mirror.unkeep()
                    raise
        try:
            await mirror.promote(force=force)
        except BaseException:
            # Where a record names this node it takes part, whatever has gone wrong then.
            if not known and not mirror.serves and not mirror.is_named_primary:
                with trio.CancelScope(shield=True):
                    await self.forget(mirror)
            raise
        return mirror

    async def forget(self, mirror: DisklessMirror) -> None:
        """This node takes no part in it any more. Raises OSError if what is kept can't be removed."""
        await mirror.forget()
        if self._mirrors.get(mirror.name) is mirror:
            del self._mirrors[mirror.name]


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.json")) if directory.is_dir() else []


def _under(name: str, own: str, node: str, asked_by: str) -> str:
    """What has `node` serve what `asked_by` calls `name` as `own`: a demotion can't say how it is called there."""
    if not asked_by:
        return f"say --as {own}"
    return f"on node {node}, run `terrace volume mirror promote {name} --from {asked_by} --as {own}`"
