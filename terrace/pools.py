"""The pools of one home: which there are, which are open, and why one isn't.

Each pool lives in a task of its own, from `Pool.open` to its close. A pool that can't be opened, or that fails later,
stays listed with its error and takes nobody with it. All state is on the trio thread.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from tiers import DeviceSpec, Policy, Pool, PoolSettings, TierError, Volume
from tiers.names import validate_name
from tiers.policy import DEFAULT, DEFAULT_NAME

log = logging.getLogger(__name__)

ANSWER_S = 30.0
"""Who wants to close a pool waits so long for the requests that have it in hand."""


@dataclass
class Slot:
    """One pool's place: its directory, and either the open pool or the reason why there is none."""

    name: str
    directory: Path
    pool: Pool | None = None
    error: OSError | None = None
    users: int = 0
    """Long operations that are under way on it; while there are any it is neither closed nor deleted by request."""
    requests: int = 0
    """Requests that have the pool in hand and answer soon; a request to close it waits for them."""
    answered: trio.Event = field(default_factory=trio.Event)
    close: trio.Event = field(default_factory=trio.Event)
    closed: trio.Event = field(default_factory=trio.Event)


class Watcher(Protocol):
    """Who has something of his own in pools while they are open."""

    def opened(self, pool: Pool) -> None:
        """It is open, and found by its name. Synchronous."""

    async def closing(self, pool: Pool) -> None:
        """It is about to be closed, and not found by its name any more; it is closed when this returns."""

    def gone(self, pool: Pool) -> None:
        """It has failed. Synchronous."""

    async def giving_up(self, pool: Pool) -> None:
        """It is about to be closed and destroyed, with what is his in it. Raises OSError if that can't be."""


class Pools:
    """Made by `open_pools`. Every refusal is an OSError whose text is a sentence."""

    def __init__(
        self,
        directory: Path,
        settings: PoolSettings,
        policies: Mapping[str, Policy],
        nursery: trio.Nursery,
        engine: type[Pool],
        events: Callable[[str, str, str], None],
    ) -> None:
        self.policies = policies
        """What the names of policies mean, in every pool that is open or will be."""
        self.watcher: Watcher | None = None
        """There is one at most: the mirrors."""
        self._directory = directory
        self._settings = settings
        self._nursery = nursery
        self._engine = engine
        self._events = events
        self._slots: dict[str, Slot] = {}

    def slots(self) -> list[Slot]:
        """All of them, failed ones too, by name."""
        return [self._slots[name] for name in sorted(self._slots)]

    def slot(self, name: str) -> Slot:
        """Raises ENOENT."""
        if name not in self._slots:
            raise TierError(errno.ENOENT, f"there is no pool {name!r}; `terrace pool list` shows those that exist")
        return self._slots[name]

    def pool(self, name: str) -> Pool:
        """The open pool. Raises ENOENT, or EIO saying why it isn't open."""
        slot = self.slot(name)
        if slot.pool is None:
            raise TierError(
                errno.EIO if slot.error else errno.EBUSY,
                f"pool {name!r} is not open: {slot.error or 'it is being opened or closed'}",
            )
        return slot.pool

    def open_pools(self) -> Iterator[Pool]:
        """Every pool that is open."""
        for slot in self.slots():
            if slot.pool is not None:
                yield slot.pool

    def open_volumes(self) -> Iterator[Volume]:
        """Every volume of every open pool."""
        for pool in self.open_pools():
            yield from pool.volumes()

    def define_policies(self, policies: Mapping[str, Policy]) -> None:
        """What the names of policies mean from now on. Raises EBUSY, and changes nothing, if one in use would vanish.

        All in one step: no checkpoint of trio in here.
        """
        lost: dict[str, list[str]] = {}
        for volume in self.open_volumes():
            if volume.policy_name in self.policies and volume.policy_name not in policies:
                lost.setdefault(volume.policy_name, []).append(volume.name)
        if lost:
            which = "; ".join(f"{name!r} is used by {', '.join(users)}" for name, users in sorted(lost.items()))
            raise TierError(
                errno.EBUSY,
                f"a policy in use can't go: {which}; give these another with `terrace volume policy` first",
            )
        self.policies = policies
        for slot in self.slots():
            if slot.pool is not None:
                slot.pool.define_policies(policies)

    @contextmanager
    def using(self, name: str) -> Iterator[Pool]:
        """The open pool, for a request that is answered soon: who wants to close the pool waits for that."""
        pool = self.pool(name)
        slot = self._slots[name]
        slot.requests += 1
        try:
            yield pool
        finally:
            slot.requests -= 1
            if not slot.requests:
                slot.answered.set()

    @contextmanager
    def occupying(self, name: str) -> Iterator[Pool]:
        """The open pool, for an operation that may take hours: who wants to close the pool gets EBUSY."""
        pool = self.pool(name)
        with _occupied(self._slots[name]):
            yield pool

    async def create(self, name: str, devices: Sequence[DeviceSpec], *, force: bool) -> Pool:
        """Label the devices and open the new pool. Nothing is left behind when it fails."""
        validate_name("pool", name)
        if name in self._slots:
            raise TierError(errno.EEXIST, f"pool {name!r} exists already; choose another name or delete it first")
        slot = self._slots[name] = Slot(name, self._directory / name, users=1)
        try:
            _make_directory(slot.directory)
            try:
                await self._engine.create(slot.directory, name, devices, force=force)
            except BaseException:
                _remove_directory(slot.directory)
                raise
        except BaseException:
            del self._slots[name]
            raise
        finally:
            slot.users -= 1
        await self._open(slot)
        return self.pool(name)

    async def reopen(self, name: str, *, truncate_log: bool = False, give_up_map: bool = False) -> Pool:
        """Try again to open a pool that failed; returns at once where it is open.

        `truncate_log`: the operator gives up what the log holds behind its damage. `give_up_map`: and what lies below
        damaged pages of maps; a pool that is open is closed for that, EBUSY while anybody uses it. A pool whose
        directory appeared since the start (rebuilt from the devices of another host) is opened too.
        """
        if name not in self._slots and name in {directory.name for directory in self._pool_directories()}:
            self._slots[name] = Slot(name, self._directory / name, error=TierError(errno.EIO, "it was not open yet"))
        slot = self.slot(name)
        if give_up_map:
            await self._open_without(slot, partial(self._open, slot, truncate_log=truncate_log, give_up_map=True))
        elif slot.pool is None:
            if slot.error is None or slot.users:
                raise TierError(errno.EBUSY, f"pool {name!r} is being opened or closed; try again in a moment")
            await self._open(slot, truncate_log=truncate_log)
        return self.pool(name)

    async def give_up(self, name: str, device: str, *, truncate_log: bool = False) -> Pool:
        """Open the pool without a device that is gone for good; what was only there is lost.

        One that is open is closed for that; EBUSY while anybody uses it. If it can't be opened without the device it
        stays as it was.
        """
        slot = self.slot(name)
        await self._open_without(slot, partial(self._open, slot, truncate_log=truncate_log, give_up=[device]))
        self._events("device", device, f"{device} of pool {name} was given up as lost")
        return self.pool(name)

    async def _open_without(self, slot: Slot, opened: Callable[[], Awaitable[None]]) -> None:
        """Open a pool that gives something up for that, and close it before; if it can't be, it stays as it was."""
        if slot.pool is not None:
            self._require_unused(slot)
        if slot.users or (slot.pool is None and slot.error is None):
            raise TierError(
                errno.EBUSY, f"pool {slot.name!r} is in use: an operation on it is running; try again later"
            )
        was_open = slot.pool is not None
        with _occupied(slot):
            await self._retire(slot)
            await opened()
            refusal = slot.error if slot.pool is None else None
            if refusal is not None and was_open:
                await self._open(slot)
        if refusal is not None:
            raise refusal

    @staticmethod
    def _require_unused(slot: Slot) -> None:
        exports = [*slot.pool.volumes(), *slot.pool.snapshots()] if slot.pool else []
        in_use = [export.name for export in exports if export.open_count]
        if in_use:
            raise TierError(
                errno.EBUSY, f"pool {slot.name!r} is in use: clients have {', '.join(in_use)}; detach first"
            )

    async def delete(self, name: str, *, force: bool = False) -> None:
        """Close the pool and destroy it with all its volumes. The device files stay.

        EBUSY while anybody uses it, and while it has legs of mirrors, or a snapshot is held: that these can't go
        without a word to the others, or at all, holds here too. With `force` not where it takes no writes any
        more: then none of them can be deleted or released before, and nothing else would lead out of that.

        EIO for one that isn't open, without `force`: whether it has any of these isn't known, and it may be whole but
        for a device that is away for the moment.
        """
        slot = self.slot(name)
        if slot.pool is None and slot.error is not None and not slot.users and not force:
            raise TierError(
                errno.EIO,
                f"pool {name!r} is not open, so what would be lost with it isn't known ({slot.error}): see to that, "
                f"then `terrace pool open {name}`; `terrace pool delete {name} --force` deletes it with whatever is in "
                "it, legs of mirrors and held snapshots too",
            )
        if slot.pool is not None:
            self._require_unused(slot)
            mirrored = [volume.name for volume in slot.pool.volumes() if volume.mirror_record]
            is_stuck = slot.pool.status().state == "read-only"
            force = force and is_stuck
            if mirrored and not force:
                way_out = (
                    "`terrace volume delete` or `terrace volume mirror remove` first, so that the others know that "
                    "these are gone"
                )
                if is_stuck:
                    way_out = (
                        "it takes no writes any more, so these can't be deleted before: `terrace pool delete "
                        f"{name} --force` says which mirrors lose a leg, and deletes it with them"
                    )
                raise TierError(errno.EBUSY, f"pool {name!r} has legs of mirrors, {', '.join(mirrored[:5])}: {way_out}")
            if not force and (held := [snapshot.name for snapshot in slot.pool.snapshots() if snapshot.held]):
                more = f" and {len(held) - 1} more snapshot{'s' * (len(held) > 2)}" if len(held) > 1 else ""
                raise TierError(
                    errno.EBUSY,
                    f"{held[0]}{more} can't be deleted, being held: release what is held with `terrace snapshot "
                    f"release {held[0]}`, then delete the pool",
                )
        if slot.users or (slot.pool is None and slot.error is None):
            raise TierError(errno.EBUSY, f"pool {name!r} is in use: an operation on it is running; try again later")
        with _occupied(slot):
            if slot.pool is not None and self.watcher is not None:
                await self.watcher.giving_up(slot.pool)
            await self._retire(slot)
            try:
                await self._engine.destroy(slot.directory)
                _remove_directory(slot.directory)
            except OSError as error:
                slot.error = error
                raise
        del self._slots[name]

    async def open_all(self) -> None:
        """Open every pool there is a directory of, at once. Never raises because of a pool."""
        async with trio.open_nursery() as nursery:
            for directory in self._pool_directories():
                slot = self._slots[directory.name] = Slot(directory.name, directory)
                nursery.start_soon(self._open, slot)

    def _pool_directories(self) -> list[Path]:
        return sorted(d for d in self._directory.iterdir() if not d.name.startswith(".") and d.is_dir())

    async def close_all(self) -> None:
        """Flush, checkpoint and close every pool, at once."""
        async with trio.open_nursery() as nursery:
            for slot in self.slots():
                nursery.start_soon(self._close, slot)

    async def _open(
        self, slot: Slot, *, truncate_log: bool = False, give_up: Sequence[str] = (), give_up_map: bool = False
    ) -> None:
        slot.error = None
        slot.close, slot.closed = trio.Event(), trio.Event()
        opened = partial(self._run, slot, truncate_log=truncate_log, give_up=give_up, give_up_map=give_up_map)
        await self._nursery.start(opened)

    async def _retire(self, slot: Slot) -> None:
        """Close the pool once the requests that have it in hand are answered; new ones don't find it.

        Raises EBUSY if one takes too long, as the creation of a volume does that waits for room in a full pool: what
        would help it must find the pool, which goes on then, as it does when this is cancelled while it waits.
        """
        pool, slot.pool = slot.pool, None
        if pool is None:
            return
        try:
            with trio.fail_after(ANSWER_S):
                while slot.requests:
                    slot.answered = trio.Event()
                    await slot.answered.wait()
        except BaseException as error:
            if not slot.closed.is_set():
                pool.define_policies(self.policies)  # it may have missed a change
                slot.pool = pool
            if isinstance(error, trio.TooSlowError):
                raise TierError(
                    errno.EBUSY,
                    f"pool {slot.name!r} is in use: a request to it has waited for more than {ANSWER_S:g} s; see "
                    f"`terrace pool show {slot.name}`, and try again later",
                ) from None
            raise
        await self._end(slot, pool)

    async def _end(self, slot: Slot, pool: Pool) -> None:
        if self.watcher is not None:
            try:
                await self.watcher.closing(pool)
            except BaseException:
                # As of a request while the daemon stops: whoever closes all of them has to find it.
                if not slot.closed.is_set():
                    slot.pool = pool
                raise
        slot.close.set()
        await slot.closed.wait()

    async def _close(self, slot: Slot) -> None:
        if slot.pool is not None:
            # In one step: from here on no export and no request finds the pool.
            pool, slot.pool = slot.pool, None
            await self._end(slot, pool)

    async def _run(
        self,
        slot: Slot,
        *,
        truncate_log: bool,
        give_up: Sequence[str],
        give_up_map: bool,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """A pool's life. What it raises ends here, as the slot's error."""
        opened = False
        try:
            validate_name("pool", slot.name)
            opening = self._engine.open(
                slot.directory,
                settings=self._settings,
                truncate_log=truncate_log,
                give_up=give_up,
                give_up_map=give_up_map,
                events=self._events,
            )
            async with opening as pool:
                if pool.name != slot.name:
                    raise TierError(
                        errno.EINVAL,
                        f"{slot.directory} holds the pool {pool.name!r}; rename the directory to that and start again",
                    )
                pool.define_policies(self.policies)
                slot.pool, opened = pool, True
                if self.watcher is not None:
                    self.watcher.opened(pool)
                log.info("pool %s is open", slot.name)
                task_status.started()
                await slot.close.wait()
                # From here on no export and no request finds it; those that did have been waited for.
                slot.pool = None
            log.info("pool %s is closed", slot.name)
        except Exception as error:
            slot.error = _as_oserror(error)
            what = "failed" if opened else "can't be opened"
            if opened or not give_up:  # a refusal to give a device up is for who asked
                self._events("pool", slot.name, f"pool {slot.name} {what}: {slot.error}")
            # A refusal speaks for itself; anything else is a bug, whose traceback belongs into the report.
            log.error("pool %s %s: %s", slot.name, what, slot.error, exc_info=None if error is slot.error else error)
        finally:
            if slot.pool is not None and self.watcher is not None:
                self.watcher.gone(slot.pool)
            slot.pool = None
            slot.closed.set()
        if not opened:
            task_status.started()


@asynccontextmanager
async def open_pools(
    directory: Path,
    settings: PoolSettings,
    engine: type[Pool] = Pool,
    *,
    policies: Mapping[str, Policy] | None = None,
    opening: trio.CancelScope | None = None,
    events: Callable[[str, str, str], None] = lambda kind, subject, text: None,
    known: Callable[[Pools], None] = lambda pools: None,
) -> AsyncIterator[Pools]:
    """The pools below `directory`, opened; closed in order, with flush and checkpoint, when the block ends.

    `known` is called before the first of them is opened, for whoever wants to tell how far that is.
    Cancelling `opening` leaves those that aren't open yet as they are: recovery begins anew the next time.
    """
    async with trio.open_nursery() as nursery:
        pools = Pools(directory, settings, policies or {DEFAULT_NAME: DEFAULT}, nursery, engine, events)
        known(pools)
        with opening or trio.CancelScope():
            await pools.open_all()
        yield pools
        await pools.close_all()


@contextmanager
def _occupied(slot: Slot) -> Iterator[None]:
    """A long operation is under way on a pool."""
    slot.users += 1
    try:
        yield
    finally:
        slot.users -= 1


def _as_oserror(error: BaseException) -> OSError:
    """The OSError in `error`, however many groups it is wrapped in; else EIO that names what it was."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return error
    return TierError(errno.EIO, f"internal error: {type(error).__name__}: {error}; please report it with the log")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700)
    except OSError as error:
        raise TierError(error.errno or errno.EIO, f"can't make the directory {directory}: {error.strerror}") from None


def _remove_directory(directory: Path) -> None:
    try:
        directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("could not remove %s: %s", directory, error.strerror)
