"""Nodes of a mirror: a simulated machine each, with the real engine, keeper, replica and mirror on it.

What is durable is the machine's media and catalog, and the home of its voter. A `Process` is one life of the daemon
there: a pool, the mirror's leg in a volume of it (`terrace.localmirror`), and the node's voter. It ends by a clean
stop, by a kill (the page cache survives), or with the machine (unflushed writes may be lost, or torn).

`surroundings` is what has to be replaced for that, and all that is: the network, the clocks of leases (each node's runs
a little faster or slower), the files of a voter's home, and what is random.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import trio

import replication.durable
import replication.voters
import terrace.primary
from replication.cluster import ClusterStore, Voter
from replication.inflight import Batch
from replication.keeper import LegKeeper, LegRecord
from replication.lease import PrimaryLease
from replication.leg import EXTENT_BYTES, Change, Done, Leg, LegState, missing_tracker
from replication.membership import LegInfo, Membership
from replication.resync import ResyncSettings
from replication.site import MirrorSettings
from replication.voters import KeptVoter, LegsCluster, RemoteVoter
from replication.voters import handlers as voter_handlers
from replication.wire import CallsOption, LegOption, read_option
from terrace.arbiter import Arbiter
from terrace.config import EtcdConfig
from terrace.localmirror import LocalMirror
from terrace.peers import Peers
from terrace.primary import MirrorPart, ServedMirror, nodes_of_mirror
from tests.simulation.machine import Disk, Machine, PowerCutError
from tests.simulation.mirrors.judge import extents_of, named, place_of
from tests.simulation.mirrors.network import Network, SimSocket, simulated
from tiers import Pool, PoolSettings
from tiers.changes import ChangedExtents

if TYPE_CHECKING:
    from tests.simulation.mirrors.life import Life

VOLUME: Final = "v"
CONNECT_S: Final = 2.0
SEGMENTS: Final = 40
SETTINGS: Final = PoolSettings(
    overlay_entries=2048, unsynced_cap_bytes=4 << 20, checkpoint_interval_s=5.0, checkpoint_log_bytes=1 << 20
)

RUNNING: ContextVar[Process] = ContextVar("RUNNING")
"""The process that a task belongs to."""


class SimPath:
    """A file of a voter's home, which is atomic and durable."""

    def __init__(self, home: Home, path: str = "") -> None:
        self.home = home
        self._path = path

    def __truediv__(self, name: str) -> SimPath:
        return SimPath(self.home, str(PurePosixPath(self._path) / name))

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError."""
        try:
            return self.home.files[self._path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, self._path) from None

    def write_bytes(self, data: bytes) -> None:
        """Raises OSError while nobody is there to do it."""
        if self.home.is_off():
            raise OSError(errno.EIO, "the process is gone")
        self.home.files.pop(self._path, None)  # the order of the files is that of their times
        self.home.files[self._path] = data

    @property
    def stem(self) -> str:
        """As a path's."""
        return PurePosixPath(self._path).stem

    @property
    def parent(self) -> SimPath:
        """As a path's."""
        return SimPath(self.home, str(PurePosixPath(self._path).parent))

    def is_dir(self) -> bool:
        """All directories are there."""
        return True

    def glob(self, pattern: str) -> list[SimPath]:
        """Files below this one."""
        return [SimPath(self.home, name) for name in self.home.files if PurePosixPath(name).match(pattern)]

    def stat(self) -> os.stat_result:
        """All of it is nothing but the time."""
        return os.stat_result((0,) * 10, {"st_mtime_ns": list(self.home.files).index(self._path)})

    def unlink(self) -> None:
        """Raises FileNotFoundError."""
        if self.home.is_off():
            raise OSError(errno.EIO, "the process is gone")
        if self.home.files.pop(self._path, None) is None:
            raise FileNotFoundError(errno.ENOENT, self._path)


class Home:
    """A daemon's home."""

    def __init__(self, is_off: Callable[[], bool]) -> None:
        self.files: dict[str, bytes] = {}
        self.is_off = is_off


class SimPeers(Peers):
    """The connections of one process."""

    def __init__(self, process: Process) -> None:
        self.node = process.node.name
        self.traffic: dict[str, Any] = {}
        self._process = process

    async def connect(self, name: str, wanted: CallsOption | LegOption) -> Any:
        """As `Peers.connect`."""
        life, here = self._process.node.life, self.node
        with trio.move_on_after(CONNECT_S):
            await life.network.carry(here, name)
            target = life.nodes[name]
            while target.process is None and not target.machine_is_up:
                await trio.sleep(0.1)
            process = target.process
            await life.network.carry(name, here)
            if process is None or not process.is_ready:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {name}")
            option = read_option(wanted.encode())
            assert isinstance(option, LegOption)
            refusal = process.judge(option)
            if refusal is not None:
                raise OSError(errno.EACCES, refusal)
            mine, theirs = life.network.pair(here, name)
            process.nursery.start_soon(process.serve, theirs, option)
            return mine, b""
        raise OSError(errno.ETIMEDOUT, f"node {name} doesn't answer")


class SimCaller:
    """Calls of one process to another node. What its caller gave up may be carried out all the same, and later."""

    def __init__(self, process: Process, target: str) -> None:
        self._process = process
        self._target = target

    async def call(self, method: str, params: dict[str, Any], timeout_s: float) -> Any:
        """As `replication.calls.Calls.call`."""
        life, here, there = self._process.node.life, self._process.node.name, self._target
        request = json.dumps(params)
        answered = trio.Event()
        outcome: list[Any] = []
        process = life.nodes[there].process
        insists = life.rng.random() < 0.5

        async def carry_out() -> None:
            target = life.nodes[there]
            await life.network.carry(here, there)
            if target.process is not process or process is None or not process.is_ready:
                if not target.machine_is_up:
                    return
                outcome.append(OSError(errno.ECONNRESET, f"the connection to {there} is gone"))
            elif not self._process.is_alive or (gave_up.is_set() and not insists):
                return
            else:
                process.nursery.start_soon(answer, process)
                return
            await life.network.carry(there, here)
            answered.set()

        async def answer(process: Process) -> None:
            try:
                result = json.loads(json.dumps(await process.handlers[method](json.loads(request))))
            except OSError as error:
                result = OSError(error.errno or errno.EIO, error.strerror or str(error))
            if not process.is_alive:
                return
            await life.network.carry(there, here)
            outcome.append(result)
            answered.set()

        gave_up = trio.Event()
        life.nursery.start_soon(carry_out)
        try:
            with trio.move_on_after(timeout_s):
                await answered.wait()
        finally:
            gave_up.set()
        if not outcome or not answered.is_set():
            raise OSError(errno.ETIMEDOUT, f"node {there} has not answered within {timeout_s:g} s")
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return outcome[0]


class WatchedMirror(ServedMirror):
    """Tells the judge what is submitted, acknowledged, and made equal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        settings = MirrorSettings(
            queue_bytes=256 << 10,
            flush_every_s=0.4,
            retry_max_s=0.4,
            stay_s=0.0,
            resync=ResyncSettings(
                floor_bytes_s=4 << 20, flush_bytes=128 << 10, workers=3, workers_beside_clients=1, idle_s=0.1
            ),
        )
        self.process = RUNNING.get()
        self.life = self.process.node.life
        self.told_started = False
        self.batch_of: dict[int, Batch] = {}
        self.was_in_sync: dict[str, Leg] = {}
        super().__init__(*arguments, **(options | {"settings": settings}))

    def submit(self, changes: list[Change], extents: Any, wide: Any, size: int, done: Done) -> None:
        life, judge = self.life, self.life.judge
        place = place_of(self.membership.term.number, self.sequence + 1)
        fresh = judge.submitted(place, changes, is_judged=life.branch is None or life.is_judged(self))
        writers = {leg.info.id for leg in self.writers}
        losses = life.losses()

        def watched(error: OSError | None) -> None:
            if error is None and self.process.is_alive and life.is_judged(self):
                # Else all who had it may have lost it while the word of it was on its way.
                judge.acknowledged(place, fresh if life.losses() == losses else ())
                self._check_in_sync(writers, self.batch_of.pop(place), place)
                self._check_missing(fresh, writers, place)
                life.alone(self)
            elif error is not None:
                judge.counts[f"refused: {errno.errorcode.get(error.errno or 0)}"] += 1
            done(error)

        super().submit(changes, extents, wide, size, watched)
        self.batch_of[place] = self.inflight.batches[self.sequence]

    def _check_in_sync(self, writers: set[str], batch: Batch, place: int) -> None:
        """Every leg that the record calls in sync has it."""
        for leg_id in self.membership.in_sync:
            member = self.members.get(leg_id)
            gone = member is None or member.leg is None
            if leg_id not in writers or (gone and batch.failures):
                self.life.judge.found(f"{named(place)} is acknowledged without {leg_id}, in sync by the record")

    def _check_missing(self, fresh: Sequence[int], writers: set[str], place: int) -> None:
        """Every leg in sync knows what others miss.

        But for one whose machine went down while its word that it has the batch was on its way: what it knew may be
        gone with what it had. It counts for nothing until it is made equal to a leg that has both, and the marks come
        with the blocks. If they didn't, it would bring others less than they miss, and these be found to differ.
        """
        in_sync = self.membership.in_sync
        touched = extents_of(fresh)
        for info in self.membership.legs:
            if info.id in in_sync or info.id in writers:
                continue
            for other in in_sync:
                node = self.membership.leg(other).node
                local = self.life.local_of(node)
                if local is None or self.life.nodes[node].is_vulnerable:
                    continue
                accepted = local.keeper.record.accepted
                if accepted is not None and not accepted.has(info.id):
                    continue  # a record may count by which that one is no leg any more; if not, it misses everything
                known: set[int] = set()
                for at, length in local.store.trackers.get(missing_tracker(info.id), ChangedExtents()).runs():
                    known.update(range(at // EXTENT_BYTES, (at + length) // EXTENT_BYTES))
                if not touched <= known:
                    self.life.judge.found(
                        f"{named(place)} is acknowledged, {info.id} misses {sorted(touched - known)}, and {other} "
                        "doesn't know it"
                    )

    def change(self) -> None:
        super().change()
        if not self.process.is_alive:
            return
        if self.started.is_set() and not self.told_started:
            self.told_started = True
            self.life.begun(self)
        if not self.lost and self.end is None:
            self.life.counts_now(self.membership)
            for member in self.members.values():
                leg, is_in_sync = member.leg, member.state is LegState.UP_TO_DATE
                known = self.was_in_sync.get(member.info.id)
                if leg is not None and leg is not known and leg.failure is None and is_in_sync:
                    self.was_in_sync[member.info.id] = leg
                    self.life.joins(self, member.info, is_local=leg.is_local)


class Node:
    """One machine, or a tie-breaker's."""

    def __init__(self, life: Life, name: str, *, has_leg: bool, rng: random.Random) -> None:
        self.life = life
        self.name = name
        self.rng = rng
        self.boot = 1
        self.machine_is_up = True
        self.is_vulnerable = False
        """Its machine went down, and its leg hasn't been made equal to the others since."""
        self.is_clean = False
        """Its last process ended cleanly."""
        self.process: Process | None = None
        self.home = Home(lambda: self.process is None or not self.process.is_alive)
        self.machine: Machine | None = None
        self.clock_rate = 1.0 + rng.uniform(-0.015, 0.015)
        self.accepted: Membership | None = None
        """The newest record that its leg has stored."""
        self.ended = trio.Event()
        self.ended.set()
        if has_leg:
            self.renew()
            self.is_vulnerable = False

    def renew(self) -> None:
        """It gets disks on which there is nothing, and has no leg. No process is on it."""
        self.machine = Machine([Disk("fast", SEGMENTS)], seed=self.rng.getrandbits(30), settings=SETTINGS)
        self.machine.pauses = self.rng.choice((0, 1))
        self.accepted = None
        self.is_vulnerable = True

    def clock(self) -> float:
        """Seconds since some time, at this machine's own speed."""
        return trio.current_time() * self.clock_rate

    async def start(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """A process, until it ends. Raises what is no simulated crash."""
        assert self.process is None and self.machine_is_up
        self.ended = trio.Event()
        self.process = process = Process(self)
        RUNNING.set(process)
        try:
            await process.run(task_status=task_status)
        finally:
            process.is_alive = False
            self.process = None
            self.ended.set()
        if not process.has_started:
            task_status.started()  # whoever waits looks whether it is there

    def fall(self) -> None:
        """From here on the process does nothing that anybody sees."""
        if self.process is not None:
            self.note_accepted()
            self.is_clean = False
            self.process.is_alive = False
            self.life.network.die(self.name, with_word=False)

    async def kill(self, *, power: bool) -> None:
        """The process dies; with `power`, the machine. On return nothing of it runs any more."""
        process = self.process
        if power:
            self.machine_is_up = False
        self.life.network.die(self.name, with_word=not power)
        if process is not None:
            self.note_accepted()
            self.is_clean = False
            process.die()
            await self.ended.wait()
        if power and not self.is_clean:
            self.is_vulnerable = True
            self.life.machine_lost(self)
        if self.machine is not None:
            if power:
                self.machine.power_cut()
            else:
                self.machine.kill()

    def power_on(self) -> None:
        """The machine is up again."""
        if not self.machine_is_up:
            self.machine_is_up = True
            self.boot += 1
            self.life.network.wake(self.name)

    def note_accepted(self) -> None:
        """Remember what record it has stored, for when it is down."""
        if self.process is not None and self.process.local is not None:
            self.accepted = self.process.local.keeper.record.accepted or self.accepted


class Process:
    """A daemon, as a mirror sees it; implements `terrace.primary.Surroundings`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.is_alive = True
        self.boot = f"boot-{node.name}-{node.boot}"
        self.keep_before_resync = True
        self.peers: Peers = SimPeers(self)
        self.own_voter = KeptVoter(
            node.name,
            SimPath(node.home),  # type: ignore[arg-type]
            self._keepers,
            is_primary=lambda mirror: self.local is not None and self.local.serves,
            clock=node.clock,
        )
        self.handlers = voter_handlers(self.own_voter)
        self.tell = self._tell
        self.arbiter = Arbiter(EtcdConfig(), Path("/nonexistent"), node.name, self._tell)
        self.local: LocalMirror | None = None
        self.pool: Pool | None = None
        self.nursery: trio.Nursery
        self.stopping = trio.Event()
        self.has_started = False
        self.has_closed = False
        self.has_session = False
        """A primary elsewhere has talked to this one, and not to another before it."""
        self._scope = trio.CancelScope()

    # -- life ----------------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """It takes connections and calls."""
        return self.is_alive and self.has_started and not self.has_closed

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Until it is stopped, or dies."""
        machine = self.node.machine
        with self._scope:
            if machine is None:
                async with trio.open_nursery() as self.nursery:
                    self.has_started = True
                    task_status.started()
                    await self.stopping.wait()
                    self.has_closed = True
                    self.nursery.cancel_scope.cancel()
                return
            with contextlib.suppress(PowerCutError):
                async with machine.open() as self.pool:
                    await self._serve(self.pool, task_status)
                self.node.is_clean = self.is_alive

    async def _serve(self, pool: Pool, task_status: trio.TaskStatus[None]) -> None:
        machine, cancel = self.node.machine, self._scope.cancel
        assert machine is not None
        stop = machine.on_off

        def off() -> None:
            if self.is_alive:
                self.node.fall()
            stop()
            cancel()

        machine.on_off = off
        async with trio.open_nursery() as self.nursery:
            volumes = [volume for volume in pool.volumes() if volume.mirror_record]
            if volumes:
                self.adopt()
            self.has_started = True
            task_status.started()
            await self.stopping.wait()
            if self.local is not None:
                await self.local.close()
            self.node.note_accepted()
            self.has_closed = True
            self.nursery.cancel_scope.cancel()

    def adopt(self) -> None:
        """The pool's volume is a leg: begin."""
        assert self.pool is not None
        volume = next(volume for volume in self.pool.volumes() if volume.mirror_record)
        self.local = LocalMirror(self.pool, volume, self)
        self.nursery.start_soon(self.local.run)

    def die(self) -> None:
        """Now. Synchronous; it runs no more once `Node.ended` is set."""
        self.is_alive = False
        if self.node.machine is not None:
            self.node.machine.stop()
        self._scope.cancel()

    # -- surroundings of its mirror ------------------------------------------------------------------------------------

    def _tell(self, kind: str, name: str, text: str, /) -> None:
        self.node.life.trace(f"{self.node.name}: {text}")

    def _keepers(self, mirror: str) -> Sequence[LegKeeper]:
        return [] if self.local is None else [self.local.keeper]

    def voter(self, node: str) -> Voter:
        return self.own_voter if node == self.node.name else RemoteVoter(node, SimCaller(self, node))

    def cluster(self, membership: Membership) -> ClusterStore:
        async def known(mirror: str) -> Sequence[str]:
            await trio.lowlevel.checkpoint()
            return tuple(dict.fromkeys((self.node.name, *nodes_of_mirror(membership))))

        return LegsCluster(self.node.name, self.voter, known)

    def disconnect(self, export: str) -> int:
        return 0

    # -- what other nodes want -----------------------------------------------------------------------------------------

    def judge(self, option: LegOption) -> str | None:
        """As `terrace.mirrors.Mirrors.judge`."""
        if self.local is None or self.local.me != option.leg:
            return f"node {self.node.name} has no leg {option.leg} open"
        return None

    async def serve(self, sock: SimSocket, option: LegOption) -> None:
        """One session."""
        try:
            if self.local is not None and self.local.me == option.leg:
                self.own_voter.heard(option.mirror)
                self.has_session = True
                await self.local.replica.serve(sock, b"", option)  # type: ignore[arg-type]
        except OSError as error:
            if "has promised" not in str(error):
                self.node.life.trace(f"{self.node.name}: session of {option.node} ended: {error}")
        finally:
            sock.close()


def _store(path: Any, data: bytes) -> None:
    path.write_bytes(data)


async def _inline(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    result = function(*arguments)
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result


def _lease(lease_s: float, voters: Any) -> PrimaryLease:
    return PrimaryLease(lease_s, voters, RUNNING.get().node.clock)


def _in_its_process(ask: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Who asks a mirror may be a client, and a lease for other voters is made on the way."""

    def asked(part: Any) -> bool:
        token = RUNNING.set(part._node)
        try:
            return ask(part)
        finally:
            RUNNING.reset(token)

    return asked


@contextlib.contextmanager
def surroundings(rng: random.Random) -> Iterator[None]:
    """See the module."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(simulated())
        patch = partial(mock.patch.object)
        for owner, name, new in (
            (terrace.primary, "ServedMirror", WatchedMirror),
            (terrace.primary, "PrimaryLease", _lease),
            (MirrorPart, "_may_serve", _in_its_process(MirrorPart._may_serve)),
            (replication.voters, "_store", _store),
            (replication.durable, "sync_directory", lambda path: None),
            (trio.to_thread, "run_sync", _inline),
        ):
            stack.enter_context(patch(owner, name, new))
        for module in ("link", "replica", "stream"):
            stack.enter_context(mock.patch(f"replication.{module}.perf_counter", lambda: 0.0))
        # The names of states that are kept tell the time of the wall's clock.
        stack.enter_context(mock.patch("terrace.keptstate.time.strftime", lambda *about: "resync-20000101-000000"))
        stack.enter_context(mock.patch("secrets.token_hex", lambda count: rng.randbytes(count).hex()))
        stack.enter_context(mock.patch("secrets.randbits", rng.getrandbits))
        yield


async def make_leg(pool: Pool, record: LegRecord, size_bytes: int) -> None:
    """A volume that is a leg."""
    volume = await pool.create_volume(VOLUME, size_bytes)
    await pool.set_mirror(volume, record.encode(), {})


__all__ = [
    "VOLUME",
    "Awaitable",
    "Leg",
    "LegInfo",
    "Network",
    "Node",
    "Process",
    "WatchedMirror",
    "make_leg",
    "surroundings",
]
