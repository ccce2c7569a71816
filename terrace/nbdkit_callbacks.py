"""What nbdkit calls of the plugin, in the order in which it does; the signatures are nbdkit-python-plugin(3)'s.

    config ...   the parameters, as they come
    get_ready    whatever may be wrong is found here, by opening the pool in a child process that closes it again: from
                 here on nbdkit forks, and nobody would hear of it (`--run` would leave its command waiting for ever)
    after_fork   the pool is opened, in a thread of its own: no thread survives a fork
    open ...     connections; requests come from sixteen threads for each
    cleanup      the pool is flushed, checkpointed and closed

A request is tried on the spot, with the engine borrowed (`terrace.lending`); what has to wait is handed over to the
loop. Acknowledged writes are in the kernel, as ever, so a `kill -9` of nbdkit costs nothing, and the next open replays
the log.

Only imported inside nbdkit, which brings the module `nbdkit`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import nbdkit  # type: ignore[import-not-found]
import trio

from terrace.collector import settle_collector
from terrace.config import Config, load_config
from terrace.exports import PoolExports
from terrace.home import find_home
from terrace.lending import LendingLoop, in_child
from terrace.schema import ConfigError
from terrace.sizes import format_size
from tiers import Pool, Snapshot, TierError, Volume
from tiers.closed import ClosedPool, look_into_closed

log = logging.getLogger("terrace.nbdkit")

API_VERSION = 2

PARAMETERS = {
    "pool": "a pool's directory, or its name below the home",
    "volume": "VOLUME or VOLUME@SNAPSHOT; without it clients choose by export name",
    "home": "where pools of that name lie (default: as for terraced)",
    "config": "a terraced configuration, for policies and [pool]",
}
PIECE_BYTES = 1 << 20
"""More than this is done in pieces, so that one request doesn't keep the others from the engine for long."""
PIECE_MASK = PIECE_BYTES - 1
BLOCK_MASK = 4096 - 1
Buffer = bytes | bytearray | memoryview
SHOWN_NAMES = 10
EXTENTS_AT_ONCE = 4096
"""An answer to a question for extents may be for a part of the range; nbdkit's client asks on."""


class Refused(Exception):
    """Told to nbdkit's log as its sentence alone; the client gets the error number that was set before."""


@dataclass(frozen=True)
class Where:
    """What the parameters say."""

    directory: Path
    volume: str | None
    config: Config


class OnePool:
    """The pool as `PoolExports` wants to see it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def pool(self, name: str) -> Pool:
        if name != self._pool.name:
            raise TierError(errno.ENOENT, f"there is no pool {name!r} here: nbdkit serves {self._pool.name!r}")
        return self._pool

    def open_pools(self) -> Iterator[Pool]:
        yield self._pool

    def open_volumes(self) -> Iterator[Volume]:
        yield from self._pool.volumes()


class Served:
    """A pool that is open, and what of it is exported."""

    def __init__(self, where: Where, pool: Pool) -> None:
        self.exports = PoolExports(OnePool(pool))
        self._pool = pool
        self._volume = where.volume
        if where.volume is not None:
            self.find("")  # so that it isn't clients who find out

    def find(self, asked: str) -> Volume | Snapshot:
        """What a client gets that asks for this export; the name only matters where none was given to nbdkit.

        Raises OSError.
        """
        name = asked if self._volume is None else self._volume
        return self.exports.find(name if not name or "/" in name else f"{self._pool.name}/{name}")


class Connection:
    """A client's handle. The engine is borrowed by whoever uses what is in it."""

    def __init__(self, loop: LendingLoop[Served], export: Volume | Snapshot) -> None:
        self.export = export
        self.loop = loop
        self.turn = loop.turn
        self.mark = loop.mark
        self.adopt = loop.adopt
        self.run = loop.run
        lends = loop.lends
        self.read_now: Callable[[int, int, memoryview], bool] = export.read_now if lends else _would_wait
        self.write_now: Callable[[list[tuple[int, Buffer]]], bool] = export.write_now if lends else _would_wait
        self.trim_now: Callable[[list[tuple[int, int]]], bool] = export.trim_now if lends else _would_wait
        export.acquire()


def _would_wait(*_: object) -> bool:
    return False


_parameters: dict[str, str] = {}
_where: Where
_loop: LendingLoop[Served]


# -- before there are clients ------------------------------------------------------------------------------------------


def dump_plugin() -> None:
    from terrace.daemon import version

    print(f"terrace_version={version()}")
    sys.stdout.flush()


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    if key not in PARAMETERS:
        known = "; ".join(f"{name}=: {what}" for name, what in PARAMETERS.items())
        raise Refused(f"there is no parameter {key!r}: {known}")
    if key in _parameters:
        raise Refused(f"{key}= is given twice: {_parameters[key]!r} and {value!r}")
    if not value:
        raise Refused(f"{key}= is empty; it is {PARAMETERS[key]}")
    _parameters[key] = value


def config_complete() -> None:
    global _where
    try:
        _where = judge(_parameters)
    except OSError as error:
        raise Refused(str(error)) from None


def judge(parameters: Mapping[str, str]) -> Where:
    """What the parameters mean. Paths become absolute here, for nbdkit leaves the directory when it forks.

    Raises TierError.
    """
    pool = parameters.get("pool")
    if pool is None:
        raise TierError(errno.EINVAL, f"pool= is missing: it is {PARAMETERS['pool']}")
    if "/" in pool:
        if "home" in parameters:
            raise TierError(errno.EINVAL, f"home= is for a pool's name, and pool={pool} is a directory; leave one out")
        directory = Path(pool).absolute()
    else:
        home = find_home(parameters.get("home"))
        directory = home.pools / pool
        if not directory.is_dir():
            raise TierError(
                errno.ENOENT,
                f"there is no pool {pool!r} in {home.pools}: name its directory (pool=DIR), or another home (home=DIR)",
            )
    file = parameters.get("config")
    try:
        return Where(directory, parameters.get("volume"), load_config(Path(file).absolute() if file else None))
    except ConfigError as error:
        raise TierError(errno.EINVAL, "; ".join(error.problems)) from None


def get_ready() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="terrace: %(levelname)s: %(message)s")
    refusal = in_child(_try)
    if refusal is not None:
        raise Refused(refusal)


def _try() -> None:
    """Open the pool and close it. Raises OSError; if that is for a name that isn't there, the pool stays as it was."""
    wanted = _where.volume
    if wanted is not None:
        closed = look_into_closed(_where.directory)
        if closed is not None:
            require_export(closed, wanted)

    async def open_and_close() -> None:
        async with opened(_where):
            pass

    trio.run(open_and_close)


def require_export(closed: ClosedPool, wanted: str) -> None:
    """Raise ENOENT unless the pool has this volume or snapshot; its own name may stand before it."""
    pool, slash, name = wanted.rpartition("/")
    if slash and pool != closed.name:
        raise TierError(errno.ENOENT, f"this is the pool {closed.name!r}, not {pool!r}: leave the pool's name out")
    if name not in closed.exports:
        shown = sorted(closed.exports)[:SHOWN_NAMES] + ["..."] * (len(closed.exports) > SHOWN_NAMES)
        what = "snapshot" if "@" in name else "volume"
        there = ", ".join(shown) or "none"
        raise TierError(errno.ENOENT, f"the pool {closed.name} has no {what} {name!r}; it has {there}")


@asynccontextmanager
async def opened(where: Where) -> AsyncIterator[Served]:
    """The pool, while the context lasts. Raises OSError."""
    opening = Pool.open(where.directory, settings=where.config.pool_settings(), events=_tell)
    async with opening as pool:
        pool.define_policies(where.config.policies())
        yield Served(where, pool)


def _tell(kind: str, subject: str, text: str) -> None:
    log.warning("%s", text)


def after_fork() -> None:
    global _loop
    _loop = LendingLoop(lambda: opened(_where), keep_threads=True)
    try:
        _loop.start()
    except Exception as error:
        _turn_clients_away()
        if isinstance(error, OSError):
            raise Refused(str(error)) from None
        raise
    settle_collector()


def _turn_clients_away() -> None:
    """Close the sockets that nbdkit listens on, wherever else they are open.

    With `--run` they are open in the parent, which waits for its command, and the command waits there for an answer.
    """
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        try:
            sock = socket.socket(fileno=os.dup(int(descriptor.name)))
        except OSError:
            continue  # no socket
        with sock, contextlib.suppress(OSError):
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                while select.select([sock], [], [], 0)[0]:
                    sock.accept()[0].close()
                sock.shutdown(socket.SHUT_RDWR)


def cleanup() -> None:
    try:
        _loop.stop()
    except OSError as error:
        raise Refused(str(error)) from None


# -- connections -------------------------------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    served = _loop.thing
    with _loop.turn:
        if _where.volume is None:
            return served.exports.list()
        export = served.find("")
        return [(export.name, _description(export))]


def default_export(readonly: bool, is_tls: bool) -> str:
    try:
        with _loop.turn:
            return _loop.thing.find("").name
    except OSError:
        return ""


def open(readonly: bool) -> Connection:
    try:
        with _loop.turn:
            return Connection(_loop, _loop.thing.find(nbdkit.export_name()))
    except OSError as error:
        _refuse(error)


def close(h: Connection) -> None:
    with h.turn:
        h.export.release()
    _loop.forget_dead()


def export_description(h: Connection) -> str:
    return _description(h.export)


def _description(export: Volume | Snapshot) -> str:
    kind = "snapshot, read-only" if export.read_only else "volume"
    return f"{format_size(export.size_bytes)} {kind}"


def get_size(h: Connection) -> int:
    return h.export.size_bytes


def block_size(h: Connection) -> tuple[int, int, int]:
    export = h.export
    return export.minimum_block_size, export.preferred_block_size, export.maximum_payload


def can_write(h: Connection) -> bool:
    return not h.export.read_only


can_trim = can_zero = can_fast_zero = can_write


def is_rotational(h: Connection) -> bool:
    return h.export.rotational


def can_multi_conn(h: Connection) -> bool:
    return h.export.can_multi_conn


def can_flush(h: Connection) -> bool:
    return True


can_extents = can_flush


def can_fua(h: Connection) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_cache(h: Connection) -> int:
    return int(nbdkit.CACHE_NATIVE)


# -- requests ----------------------------------------------------------------------------------------------------------


def pread(h: Connection, buf: memoryview, offset: int, flags: int) -> None:
    try:
        if not h.mark.adopted:
            h.adopt()
        if len(buf) > PIECE_BYTES:
            for at, end in pieces(offset, len(buf)):
                pread(h, buf[at:end], offset + at, flags)
            return
        if h.loop.waits:
            h.loop.let_pass()
        with h.turn:
            done = h.read_now(offset, len(buf), buf)
        if not done:
            h.run(h.export.read, offset, len(buf), buf)
    except OSError as error:
        _refuse(error)


def pwrite(h: Connection, buf: memoryview, offset: int, flags: int) -> None:
    try:
        if not h.mark.adopted:
            h.adopt()
        if len(buf) > PIECE_BYTES:
            for at, end in pieces(offset, len(buf)):
                pwrite(h, buf[at:end], offset + at, 0)
        else:
            if h.loop.waits:
                h.loop.let_pass()
            with h.turn:
                done = h.write_now([(offset, buf)])
            if not done:
                h.run(h.export.write, offset, buf)
        if flags & nbdkit.FLAG_FUA:
            h.run(h.export.flush)
    except OSError as error:
        _refuse(error)


def pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a request at multiples of `PIECE_BYTES` of the volume, so that no block is in two pieces."""
    at = 0
    while at < length:
        end = min(length, (offset + at & ~PIECE_MASK) + PIECE_BYTES - offset)
        yield at, end
        at = end


def flush(h: Connection, flags: int) -> None:
    try:
        h.run(h.export.flush)
    except OSError as error:
        _refuse(error)


def trim(h: Connection, count: int, offset: int, flags: int) -> None:
    try:
        if not _trimmed_now(h, count, offset):
            h.run(h.export.trim, offset, count)
        if flags & nbdkit.FLAG_FUA:
            h.run(h.export.flush)
    except OSError as error:
        _refuse(error)


def zero(h: Connection, count: int, offset: int, flags: int) -> None:
    no_hole, fast = not flags & nbdkit.FLAG_MAY_TRIM, bool(flags & nbdkit.FLAG_FAST_ZERO)

    async def write_zeroes() -> None:
        await h.export.write_zeroes(offset, count, no_hole=no_hole, fast=fast)

    try:
        # Of whole blocks a trim is all that zeroes need: it rounds nothing, and what is unmapped reads as zeroes.
        if no_hole or (offset | count) & BLOCK_MASK or not _trimmed_now(h, count, offset):
            h.run(write_zeroes)
        if flags & nbdkit.FLAG_FUA:
            h.run(h.export.flush)
    except OSError as error:
        _refuse(error)


def _trimmed_now(h: Connection, count: int, offset: int) -> bool:
    if not h.mark.adopted:
        h.adopt()
    if h.loop.waits:
        h.loop.let_pass()
    with h.turn:
        return h.trim_now([(offset, count)])


def cache(h: Connection, count: int, offset: int, flags: int) -> None:
    try:
        h.run(h.export.cache, offset, count)
    except OSError as error:
        _refuse(error)


def extents(h: Connection, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    limit = 1 if flags & nbdkit.FLAG_REQ_ONE else EXTENTS_AT_ONCE
    try:
        found = h.run(h.export.extents, offset, count, limit)
    except OSError as error:
        _refuse(error)
    answer = []
    for length, state in found:
        # The protocol's bits for holes and zeroes are also nbdkit's.
        answer.append((offset, length, state))
        offset += length
    return answer


def _refuse(error: OSError) -> NoReturn:
    nbdkit.set_error(error.errno or errno.EIO)
    raise Refused(str(error)) from None


# -- what nbdkit says ----------------------------------------------------------------------------------------------

_format_exception = traceback.format_exception


def speak_shortly() -> None:
    """Have nbdkit log a refusal as its sentence, not as a traceback."""
    setattr(traceback, "format_exception", _format_refusals_shortly)  # noqa: B010 (mypy: it has another signature)


def _format_refusals_shortly(*arguments: Any, **options: Any) -> list[str]:
    """nbdkit logs an exception of a callback as `traceback.format_exception` tells it; nobody else here uses that."""
    error = arguments[1] if len(arguments) > 1 else arguments[0]
    return [str(error)] if isinstance(error, Refused) else _format_exception(*arguments, **options)
