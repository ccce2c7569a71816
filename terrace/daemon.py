"""terraced: the one place where configuration, engine, NBD server and control API are put together.

The order is the argument. Up: lock the home, bind every address, or take those that systemd has bound (so that a taken
one is found before anything has changed, and clients that connect early wait instead of being refused), open the pools,
serve, tell the supervisor.
Down, on SIGTERM or SIGINT: stop accepting, answer what is in flight, then flush, checkpoint and close each pool; what
is still being opened is left as it is, for recovery can begin anew at any point. A
second signal cuts the waiting for clients short, a third ends the process at once; even that loses nothing that was
acknowledged, since acknowledged writes are in the kernel. SIGHUP reads the policies anew; one that comes before the
pools are open is obeyed when they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import faulthandler
import importlib.metadata
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

import nbd.server
from nbd.export import Exports
from nbd.listen import Listener
from nbd.tls import TlsFiles, rehearse
from terrace.access import RuledExports
from terrace.api import Api
from terrace.collector import settle_collector
from terrace.config import Config, TlsConfig, load_config
from terrace.definitions import Definitions
from terrace.events import Events
from terrace.exports import PoolExports
from terrace.extras import how_to_install
from terrace.home import Home, HomeError, find_home
from terrace.httpserver import serve_http
from terrace.listening import Listening, listen
from terrace.lowwater import keep_watch
from terrace.passedsockets import PassedSocketError, PassedSockets, receive
from terrace.pools import Pools, open_pools
from terrace.reclaim import stand_apart
from terrace.scheduler import keep_schedules
from terrace.schema import ConfigError
from terrace.scrubs import keep_schedule
from terrace.stall import StallMeter
from terrace.stdio import fill_standard_streams
from terrace.supervisor import Supervisor
from tiers import Pool

log = logging.getLogger("terraced")

# What clients get to receive their last replies, and API requests to finish, before they are cut off.
_LEAVING_S = 3.0


def main(arguments: Sequence[str] | None = None, *, engine: type[Pool] = Pool) -> int:
    """The entry point; returns the exit status."""
    fill_standard_streams(output_matters=False)
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 1
    if options.check_config:
        print(f"{options.config or 'the default configuration'}: good")
        return 0
    _start_logging(config.log.level)
    # Who ends a daemon that hangs, as systemd's watchdog does with SIGABRT, finds in the log where it hung.
    if not faulthandler.is_enabled():
        faulthandler.enable(2)
    home = find_home(options.home)
    stalls = StallMeter()
    try:
        passed = receive()
        with home.locked():
            stand_apart()
            return trio.run(partial(run, home, options.config, config, passed, stalls, engine), instruments=[stalls])
    except (HomeError, PassedSocketError) as error:
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


def version() -> str:
    """The installed version of Terrace."""
    try:
        return importlib.metadata.version("terrace")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _start_logging(level: str) -> None:
    # Under systemd the journal has the time already.
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=stamp + "%(levelname)-7s %(name)s: %(message)s")
    # Their debug lines are about every request and say nothing about Terrace.
    for chatty in ("asyncio", "hypercorn", "terrace.httpserver"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


async def run(
    home: Home, file: Path | None, config: Config, passed: PassedSockets, stalls: StallMeter, engine: type[Pool]
) -> int:
    """Serve until told to stop; returns the exit status. The home is locked by the caller; `config` is from `file`."""
    supervisor = Supervisor()
    async with trio.open_nursery() as watchers:
        with (
            ExitStack() as sockets,
            trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            trio.open_signal_receiver(signal.SIGHUP) as hangups,
        ):
            try:
                if config.fuse.mountpoint:
                    await _require_fuse(Path(config.fuse.mountpoint))
                tls = await _tls_files(home, config.nbd.tls)
                listening = await listen(home, config.nbd, passed, sockets)
            except OSError as error:
                print(f"terraced: {error.strerror}", file=sys.stderr)
                return 1
            watchers.start_soon(supervisor.run)
            told, opening, serving = trio.Event(), trio.CancelScope(), trio.CancelScope()
            watchers.start_soon(_obey, signals, supervisor, told, opening, serving)
            events = Events(home.path)
            watchers.start_soon(events.run)
            opened = open_pools(
                home.pools,
                config.pool_settings(),
                engine,
                policies=config.policies(),
                opening=opening,
                events=events.add,
                known=supervisor.opening,
            )
            async with opened as pools:
                definitions = Definitions(file, config, pools)
                watchers.start_soon(definitions.reload_on, hangups, supervisor.reloading)
                if not told.is_set():
                    with serving:
                        await _serve(
                            *(home, config, stalls, definitions, pools, events),
                            *(listening, tls, supervisor, told, serving),
                        )
            log.info("stopped")
            watchers.cancel_scope.cancel()
    return 0


async def _serve(
    home: Home,
    config: Config,
    stalls: StallMeter,
    definitions: Definitions,
    pools: Pools,
    events: Events,
    listening: Listening,
    tls: TlsFiles | None,
    supervisor: Supervisor,
    told: trio.Event,
    serving: trio.CancelScope,
) -> None:
    """Serve clients and the API until `told` to stop and what is in flight has ended. `serving`: the scope around."""
    async with trio.open_nursery() as services:
        limits = config.nbd.limits()
        exports: Exports = PoolExports(pools)
        if rules := config.nbd.rules():
            exports = RuledExports(exports, rules)
        required = config.nbd.tls.mode == "required"
        serve_nbd = partial(nbd.server.serve, exports, listening.nbd, limits=limits, tls=tls, tls_required=required)
        server = await services.start(serve_nbd)
        daemon = Daemon(home, listening.nbd, server, stalls, tls_required=required)
        api_shutdown = trio.Event()
        app = Api(pools, daemon, definitions, events).app()
        await services.start(serve_http, app, listening.api.sock, api_shutdown)
        if config.fuse.mountpoint:
            # What it needs is an extra that not everybody has; whoever configures it has been asked for it at start.
            from terrace.fuse.service import serve_files

            services.start_soon(serve_files, pools, Path(config.fuse.mountpoint), told)
        async with trio.open_nursery() as background:
            background.start_soon(keep_schedule, pools, config.scrub.plan())
            background.start_soon(keep_watch, pools, config.space.levels, events)
            background.start_soon(keep_schedules, pools, definitions.schedules, events)
            settle_collector()
            stalls.reset()
            print("terraced is ready:", *daemon.uris(), flush=True)
            supervisor.ready(lambda: len(server.status().connections))
            await told.wait()
            background.cancel_scope.cancel()
        log.info("finishing what clients have in flight")
        api_shutdown.set()
        server.start_drain()
        # Both services end by themselves now, and the pools are closed after them; a client that doesn't take its last
        # replies holds nobody up.
        serving.deadline = trio.current_time() + config.nbd.drain_grace_s + _LEAVING_S


async def _tls_files(home: Home, config: TlsConfig) -> TlsFiles | None:
    """What TLS needs, if it is on. Raises OSError; what peers won't like is a warning, as it may yet be replaced."""
    try:
        files = await trio.to_thread.run_sync(config.files, home.path)
        if files is not None:
            complaint = await trio.to_thread.run_sync(partial(rehearse, files.certificate, files.key, server=True))
            if complaint:
                log.warning(
                    "clients will refuse the certificate %s: %s; put another in its place (no restart is needed)",
                    *(files.certificate, complaint),
                )
    except OSError as error:
        raise OSError(error.errno, f"TLS: {error.strerror}; see [nbd.tls] in the configuration") from None
    return files


async def _require_fuse(mountpoint: Path) -> None:
    """Raises OSError if nothing can be mounted there."""
    try:
        from terrace.fuse.session import require_mountpoint
    except ImportError as error:
        raise OSError(
            errno.ENOTSUP, f"mountpoint under [fuse] needs pyfuse3 ({error}): {how_to_install('pyfuse3')}"
        ) from None
    await require_mountpoint(mountpoint)


async def _obey(
    signals: AsyncIterator[int],
    supervisor: Supervisor,
    told: trio.Event,
    opening: trio.CancelScope,
    serving: trio.CancelScope,
) -> None:
    """The first, second and third signal."""
    number = await anext(signals)
    log.info("%s: stopping", signal.Signals(number).name)
    supervisor.stopping()
    told.set()
    opening.cancel()
    await anext(signals)
    log.warning("second signal: dropping clients and closing the pools at once; a third ends terraced on the spot")
    serving.cancel()
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
        *,
        tls_required: bool,
    ) -> None:
        self._home = home
        self._listeners = listeners
        self._server = server
        self._stalls = stalls
        self._tls_required = tls_required
        self._started_s = time.monotonic()

    def uris(self) -> list[str]:
        """The NBD URI of each address, without an export name."""
        return [listener.uri(tls=self._tls_required) for listener in self._listeners]

    def status(self, *, reset: bool) -> dict[str, Any]:
        served = self._server.status()
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
