"""terraced: the one place where configuration, engine, NBD server and control API are put together.

The order is the argument. Up: lock the home, bind every address, or take those that systemd has bound (so that a taken
one is found before anything has changed, and clients that connect early wait instead of being refused), open the pools,
serve, tell the supervisor.
Down, on SIGTERM or SIGINT: stop accepting, answer what is in flight, then flush, checkpoint and close each pool; what
is still being opened is left as it is, for recovery can begin anew at any point. A
second signal cuts the waiting for clients short, a third ends the process at once; even that loses nothing that was
acknowledged, since acknowledged writes are in the kernel.

On SIGHUP or `terrace upgrade` a new process takes over, with the configuration as it is then: `terrace.upgrade`.
Clients are stopped and the pools closed as above, but the clients stay. If it comes to nothing, this process opens the
pools again and goes on with them. A successor starts in `run` as any daemon does, and takes over when its pools are
open.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import faulthandler
import functools
import importlib.metadata
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

import nbd.server
from nbd.export import Exports
from nbd.listen import Listener
from nbd.suspended import Suspended
from nbd.tls import TlsFiles, rehearse
from nbd.wire import OPT_TERRACE
from terrace.access import RuledExports
from terrace.api import Api
from terrace.arbiter import Arbiter
from terrace.collector import settle_collector
from terrace.config import Config, load_config
from terrace.definitions import Definitions
from terrace.duedeletions import DueDeletions
from terrace.events import Events
from terrace.exports import PoolExports
from terrace.extras import how_to_install
from terrace.handover import Estate, HandoverError, Predecessor
from terrace.home import Home, HomeError, find_home, write_holder
from terrace.httpserver import Shutdown, serve_http
from terrace.keptclients import has_store, leave_behind, take_back
from terrace.listening import Listening, judge_addresses, listen
from terrace.lowwater import keep_watch
from terrace.mirrors import Mirrors
from terrace.mirrorsnapshots import MirrorSnapshots
from terrace.passedsockets import PassedSocketError, PassedSockets, inherit, receive, to_pass
from terrace.peers import NodeTakeover, Peers
from terrace.pools import Pools, open_pools
from terrace.reclaim import stand_apart
from terrace.scheduler import keep_schedules
from terrace.schema import ConfigError
from terrace.scrubs import keep_schedule
from terrace.stall import StallMeter
from terrace.stdio import fill_standard_streams
from terrace.supervisor import Supervisor
from terrace.upgrade import PATIENCE_S, Heir, Upgrade
from tiers import Pool

log = logging.getLogger("terraced")

# What clients get to receive their last replies, and API requests to finish, before they are cut off.
_LEAVING_S = 3.0


def main(arguments: Sequence[str] | None = None, *, engine: type[Pool] = Pool) -> int:
    """The entry point; returns the exit status."""
    fill_standard_streams(output_matters=False)
    options = _parser().parse_args(arguments)
    predecessor: Predecessor | None = None
    try:
        predecessor = Predecessor.from_environment()
        config = load_config(options.config)
        home = find_home(options.home)
        if predecessor is not None or options.check_config:
            # Before any client has to wait for what comes to nothing. At a start it comes where there is a log.
            judge_addresses(config.nbd, config.node.listen)
            load_tls(home, config)
    except (HandoverError, HomeError) as error:
        print(f"terraced: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if predecessor is not None:
            predecessor.failed(error.strerror or str(error))
        print(f"terraced: {error.strerror}", file=sys.stderr)
        return 1
    except ConfigError as error:
        if predecessor is not None:
            predecessor.failed("; ".join(error.problems))
        print("\n".join(error.problems), file=sys.stderr)
        return 1
    if options.check_config:
        try:
            config.etcd.judge_files(home.path)
        except OSError as error:
            print(f"terraced: {error.strerror}", file=sys.stderr)
            return 1
        print(f"{options.config or 'the default configuration'}: good")
        return 0
    _start_logging(config.log.level)
    # Who ends a daemon that hangs, as systemd's watchdog does with SIGABRT, finds in the log where it hung.
    if not faulthandler.is_enabled():
        faulthandler.enable(2)
    stalls = StallMeter()
    heir: Heir | None = None
    inherited: int | None = None
    try:
        passed = receive()
        if predecessor is not None:
            predecessor.loaded(version())
            inherited, estate = predecessor.receive()
            heir = Heir(predecessor, estate)
            passed = inherit(estate.listeners)
        with home.locked(inherited) as lock:
            stand_apart()
            serve = partial(run, home, lock, options.config, config, passed, stalls, engine, heir)
            return trio.run(serve, instruments=[stalls])
    except (HomeError, PassedSocketError, HandoverError) as error:
        if predecessor is not None:
            predecessor.failed(str(error))
        print(f"terraced: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="terraced", description="Serve the volumes of all pools below the home over NBD, until SIGTERM."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML configuration (default: none)")
    parser.add_argument(
        "--home",
        metavar="DIR",
        help="where pools and sockets lie (default: $TERRACE_HOME, else /var/lib/terrace as root, "
        "else $XDG_DATA_HOME/terrace)",
    )
    parser.add_argument("--check-config", action="store_true", help="only say whether the configuration is good")
    parser.add_argument("--version", action="version", version=f"terraced {version()}")
    return parser


@functools.cache
def version() -> str:
    """The version of this process, which stays what it is when another one is installed over it.

    `main` asks for it before it does anything else.
    """
    try:
        return importlib.metadata.version("terrace")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _start_logging(level: str) -> None:
    # Under systemd the journal has the time already.
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=stamp + "%(levelname)-7s %(name)s: %(message)s")
    # Their debug lines are about every request and say nothing about Terrace.
    for chatty in ("asyncio", "hypercorn", "terrace.httpserver", "httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@dataclass
class Orders:
    """What the daemon was told by signals, and the scopes that they end."""

    told: trio.Event
    """To stop."""
    opening: trio.CancelScope
    serving: trio.CancelScope


async def run(
    home: Home,
    lock: int,
    file: Path | None,
    config: Config,
    passed: PassedSockets,
    stalls: StallMeter,
    engine: type[Pool],
    heir: Heir | None = None,
) -> int:
    """Serve until told to stop, or until a successor does; returns the exit status.

    The home is locked by the caller, by the descriptor `lock`; `config` is from `file`. `heir`: this process is a
    successor itself.
    """
    supervisor = Supervisor()
    orders = Orders(trio.Event(), trio.CancelScope(), trio.CancelScope())
    async with trio.open_nursery() as watchers:
        with (
            ExitStack() as sockets,
            trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            trio.open_signal_receiver(signal.SIGHUP) as hangups,
        ):
            try:
                if config.fuse.mountpoint:
                    await _require_fuse(Path(config.fuse.mountpoint))
                tls = await _tls_files(home, config)
                listening = await listen(home, config.nbd, passed, sockets, config.node.listen)
            except OSError as error:
                if heir is not None:
                    heir.predecessor.failed(error.strerror or str(error))
                print(f"terraced: {error.strerror}", file=sys.stderr)
                return 1
            events = Events(home.path)
            watchers.start_soon(_obey, signals, supervisor, orders)

            def begin() -> None:
                """This process is the service."""
                write_holder(lock)
                listening.claim()
                watchers.start_soon(supervisor.run)
                watchers.start_soon(events.run)

            if heir is None:
                begin()
            clients: Sequence[Suspended] = [] if heir is None else heir.estate.clients
            upgrade = Upgrade(version())
            in_force = config
            status = 0
            while not orders.told.is_set():
                orders.opening, orders.serving = trio.CancelScope(), trio.CancelScope()
                opened = open_pools(
                    home.pools,
                    config.pool_settings(),
                    engine,
                    policies=in_force.policies(),
                    opening=orders.opening,
                    events=events.add,
                    known=supervisor.opening,
                )
                left: Left | None = None
                async with opened as pools, trio.open_nursery() as turn:
                    definitions = Definitions(file, config, pools, in_force)
                    if heir is not None and heir.succession is None:
                        try:
                            await heir.take_over(pools, config, orders.told)
                        except HandoverError as error:
                            print(f"terraced: {error}", file=sys.stderr)
                            sockets.close()
                            heir.predecessor.failed(str(error))
                            status = 1
                            break
                        begin()
                        upgrade.succession = heir.succession
                    elif (passed.memory is not None or passed.clients) and not orders.told.is_set():
                        clients = await trio.to_thread.run_sync(take_back, passed.memory, passed.clients)
                        passed.memory, passed.clients = None, []
                    upgrade.obstacle = partial(_obstacle, pools, config)
                    turn.start_soon(upgrade.request_on, hangups)
                    turn.start_soon(upgrade.run, pools)
                    if not orders.told.is_set():
                        service = Service(
                            *(home, config, stalls, definitions, pools, events),
                            *(listening, tls, supervisor, orders, upgrade),
                        )
                        with orders.serving:
                            left = await service.run(clients)
                        clients = []
                    turn.cancel_scope.cancel()
                in_force = definitions.config
                if left is None:
                    break
                clients = left.clients
                if orders.told.is_set():
                    break
                heirlooms = [to_pass(listener) for listener in listening.all()]
                estate = Estate(heirlooms, left.clients, left.pools, left.policies, version(), left.since_s)
                if await upgrade.hand_over(lock, estate, orders.told, supervisor.succeeded_by):
                    for listener in listening.all():
                        listener.keep_file()
                    for client in left.clients:
                        client.close()
                    clients = []
                    break
            upgrade.abandon()
            if heir is not None and heir.succession is None:
                if not status:
                    sockets.close()
                    heir.predecessor.failed("it was told to stop")
                    status = 1
            elif has_store():
                await trio.to_thread.run_sync(leave_behind, clients)
            for client in clients:
                client.close()
            if orders.told.is_set():
                upgrade.pass_on_stop()
            log.info("stopped")
            watchers.cancel_scope.cancel()
    return status


@dataclass(frozen=True)
class Left:
    """What is left when clients were stopped for a successor."""

    clients: list[Suspended]
    pools: list[str]
    policies: list[str]
    since_s: float


@dataclass(frozen=True)
class Service:
    """The NBD server, the control API, the files and what has a clock, over open pools."""

    home: Home
    config: Config
    stalls: StallMeter
    definitions: Definitions
    pools: Pools
    events: Events
    listening: Listening
    tls: TlsFiles | None
    supervisor: Supervisor
    orders: Orders
    upgrade: Upgrade

    async def run(self, clients: Sequence[Suspended]) -> Left | None:
        """Serve, going on with `clients`, until told to stop, or until a successor wants to have the clients.

        Returns when what is in flight has ended; the clients, where they are for a successor.
        """
        peers = Peers(self.config, self.home.path, version(), self._pool_names, self.events.add)
        keep = self.config.node.keep_before_resync
        arbiter = Arbiter(self.config.etcd, self.home.path, peers.node, self.events.add)
        mirrors = Mirrors(self.pools, peers, self.home.path, self.events.add, arbiter, keep_before_resync=keep)
        async with trio.open_nursery() as around:
            # They end behind the server: what clients have in flight goes to other nodes over these.
            around.start_soon(peers.run)
            around.start_soon(arbiter.run)
            await around.start(mirrors.run)
            left = await self._serve(clients, peers, mirrors)
            await mirrors.close()
            around.cancel_scope.cancel()
        return left

    def _pool_names(self) -> list[str]:
        return [pool.name for pool in self.pools.open_pools()]

    async def _serve(self, clients: Sequence[Suspended], peers: Peers, mirrors: Mirrors) -> Left | None:
        left: Left | None = None
        ending = trio.Event()
        async with trio.open_nursery() as services:
            settings, listeners = self.config.nbd, self.listening.nbd
            exports: Exports = PoolExports(self.pools, mirrors)
            if rules := settings.rules():
                exports = RuledExports(exports, rules)
            required = settings.tls.mode == "required"
            serve = partial(nbd.server.serve, exports, listeners, limits=settings.limits(), resumed=clients)
            through = MirrorSnapshots(mirrors, DueDeletions(self.home.path, self.events.add))
            handlers = {**mirrors.handlers(), **through.handlers()}
            takeovers = {OPT_TERRACE: NodeTakeover(peers, handlers, mirrors)} if peers.node else {}

            def known(server: nbd.server.Server) -> None:
                mirrors.drop_clients = server.disconnect

            serve = partial(serve, tls=self.tls, tls_required=required, takeovers=takeovers, known=known)
            server = await services.start(serve)
            daemon = Daemon(self.home, listeners, server, self.stalls, self.upgrade, tls_required=required)
            shutdown = Shutdown()
            app = Api(self.pools, daemon, self.definitions, self.events, mirrors, through).app()
            await services.start(serve_http, app, self.listening.api.sock, shutdown)
            if self.config.fuse.mountpoint:
                # What it needs is an extra that not everybody has; who configures it has been asked for it at start.
                from terrace.fuse.service import serve_files

                services.start_soon(serve_files, self.pools, mirrors, Path(self.config.fuse.mountpoint), ending)
            async with trio.open_nursery() as background:
                background.start_soon(keep_schedule, self.pools, self.config.scrub.plan())
                background.start_soon(keep_watch, self.pools, self.config.space.levels, self.events)
                schedules = partial(keep_schedules, self.pools, self.definitions.schedules, self.events, through)
                background.start_soon(schedules)
                background.start_soon(through.run)
                settle_collector()
                self.stalls.reset()
                _announce(daemon.uris())
                self.supervisor.ready(lambda: len(server.status().connections))
                await _first(self.orders.told, self.upgrade.wanted)
                background.cancel_scope.cancel()
            ending.set()
            stopping, since_s = self.orders.told.is_set(), time.monotonic()
            if stopping:
                log.info("finishing what clients have in flight")
                # Both services end by themselves now, and the pools are closed after them; a client that doesn't take
                # its last replies holds nobody up.
                self.orders.serving.deadline = trio.current_time() + self.config.nbd.drain_grace_s + _LEAVING_S
            else:
                self.supervisor.reloading()
            if stopping and not has_store():
                shutdown.begin()
                server.start_drain()
            else:
                patience_s = self.config.nbd.drain_grace_s if stopping else PATIENCE_S
                shutdown.begin(patience_s)
                open_now = [pool.name for pool in self.pools.open_pools()]
                suspended = await server.suspend(patience_s, 0.0 if stopping else mirrors.patience_s())
                left = Left(suspended, open_now, list(self.pools.policies), since_s)
                log.info("stopped %d clients for the next terraced", len(left.clients))
        return left


def _announce(uris: Sequence[str]) -> None:
    """Say where it serves. Who was to hear that may be gone long since, where this is a successor."""
    try:
        print("terraced is ready:", *uris, flush=True)
    except OSError as error:
        log.warning("can't say on standard output that it is ready: %s", error.strerror)
        # What was not written would be tried again, and fail again, at the end.
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


async def _first(*events: trio.Event) -> None:
    """Wait for one of them."""
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)


def _obstacle(pools: Pools, config: Config) -> str:
    """Why the daemon shouldn't be replaced now; empty if nothing is in the way."""
    busy = [slot.name for slot in pools.slots() if slot.users]
    if busy:
        return f"operations are running on {', '.join(busy)}, and would be cut short; wait for them, or --force"
    if config.fuse.mountpoint:
        return (
            f"volumes are files below {config.fuse.mountpoint}, and who has one open would be cut off; close them and "
            "--force, or let `terrace mount` have the mount point, which outlives the daemon"
        )
    return ""


async def _tls_files(home: Home, config: Config) -> TlsFiles | None:
    """What TLS needs, if it is on. Raises OSError; what peers won't like is a warning, as it may yet be replaced."""
    files = await trio.to_thread.run_sync(load_tls, home, config)
    if files is not None:
        try:
            complaint = await trio.to_thread.run_sync(partial(rehearse, files.certificate, files.key, server=True))
            if complaint is None and any(not peer.plaintext for peer in config.peers.values()):
                judged = partial(rehearse, files.certificate, files.key, server=False)
                if await trio.to_thread.run_sync(judged):
                    log.warning(
                        "peers will refuse the certificate %s, which is for servers only: `terrace tls node %s --here` "
                        "makes one for both directions",
                        *(files.certificate, config.node.name),
                    )
        except OSError as error:
            raise _about_tls(error, config) from None
        if complaint:
            log.warning(
                "clients will refuse the certificate %s: %s; put another in its place (no restart is needed)",
                *(files.certificate, complaint),
            )
    return files


def load_tls(home: Home, config: Config) -> TlsFiles | None:
    """What TLS needs, if it is on. Raises OSError that says which file can't be used."""
    try:
        return config.tls_files(home.path)
    except OSError as error:
        raise _about_tls(error, config) from None


def _about_tls(error: OSError, config: Config) -> OSError:
    step = "see [nbd.tls] in the configuration"
    if error.errno == errno.ENOENT and config.node.name:
        step = f"`terrace tls node {config.node.name}` makes a node's certificate and key, for its tls/; or {step}"
    return OSError(error.errno, f"TLS: {error.strerror}; {step}")


async def _require_fuse(mountpoint: Path) -> None:
    """Raises OSError if nothing can be mounted there."""
    try:
        from terrace.fuse.session import require_mountpoint
    except ImportError as error:
        raise OSError(
            errno.ENOTSUP, f"mountpoint under [fuse] needs pyfuse3 ({error}): {how_to_install('pyfuse3')}"
        ) from None
    await require_mountpoint(mountpoint)


async def _obey(signals: AsyncIterator[int], supervisor: Supervisor, orders: Orders) -> None:
    """The first, second and third signal."""
    number = await anext(signals)
    log.info("%s: stopping", signal.Signals(number).name)
    supervisor.stopping()
    orders.told.set()
    orders.opening.cancel()
    await anext(signals)
    log.warning("second signal: dropping clients and closing the pools at once; a third ends terraced on the spot")
    orders.serving.cancel()
    await anext(signals)
    log.warning("third signal: ending; the next start replays the log")
    logging.shutdown()
    os._exit(1)


class Daemon:
    """What the daemon says of itself; implements `terrace.api.DaemonStatus`."""

    def __init__(
        self,
        home: Home,
        listeners: Sequence[Listener],
        server: nbd.server.Server,
        stalls: StallMeter,
        upgrade: Upgrade,
        *,
        tls_required: bool,
    ) -> None:
        self._home = home
        self._listeners = listeners
        self._server = server
        self._stalls = stalls
        self.upgrade = upgrade
        self._tls_required = tls_required
        self._started_s = time.monotonic()

    def uris(self) -> list[str]:
        """The NBD URI of each address, without an export name."""
        return [listener.uri(tls=self._tls_required) for listener in self._listeners]

    def status(self, *, reset: bool) -> dict[str, Any]:
        served, upgrade = self._server.status(), self.upgrade.status()
        answer = {
            "version": version(),
            "pid": os.getpid(),
            "home": str(self._home.path),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "resident_bytes": _resident_bytes(),
            "nbd": {
                "uris": self.uris(),
                "accepted": served.accepted,
                "refused": served.refused,
                "draining": served.draining,
                "total": dataclasses.asdict(served.total),
                "connections": [dataclasses.asdict(connection) for connection in served.connections],
            },
            "upgrade": {"state": upgrade["state"], "error": upgrade["error"]},
            "succession": upgrade["succession"],
            "loop_stall_max_ms": round(self._stalls.max_ms, 3),
            "loop_stall_task": self._stalls.task_name,
        }
        if reset:
            self._stalls.reset()
        return answer


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
