"""The driver that lets the kernel's own NBD client make the device, `/dev/nbdN`.

The keeper does the handshake and gives the connected sockets to the kernel, which alone speaks on them from then on; so
the data never passes through the keeper, and the device outlives it. When a connection ends, because the daemon did,
the kernel says so (LINK_DEAD) and holds what is asked of the device, and the keeper offers it new sockets until one
daemon or another takes them.

What that rests on is in the kernel's `drivers/block/nbd.c` (read as of 6.1 and 6.6):

- A request whose connection ended without its reply is sent again, on another connection, when its timer fires: that is
  `queue/io_timeout` after it was sent, and again each such time. So the timer has to be short for a restart of the
  daemon to be a short pause. Sending again is safe only where nothing of the first time can take effect later.
- With **one connection** and a timeout of 0 a timer that fires on a connection that lives does nothing: the kernel
  waits as long as the daemon takes. What is sent again was on a connection that the daemon has closed, and the daemon
  closes one when all that it had read from it has ended (`nbd/connection.py`).
- With **several connections** the kernel takes one whose request is older than the timer for dead, whatever the timeout
  says, shuts it down, and sends the request again on another. Then the daemon may still hold the first copy, unread or
  waiting for room, and apply it after a newer write of the same block: it must not, and doesn't, for before it writes
  for a connection it ends those of the same export that were shut down (`nbd/connection.py`, "Fence"). It is safe then,
  but a write that has to wait for longer than the timer (a pool that is full, a policy's limits) starts its waiting
  anew. So one connection is the default, and the timer is longer with several.
- A reply that carries an error is an I/O error of the device; so a daemon that stops doesn't answer what it won't do,
  but closes.
- I/O that finds all connections dead waits for `dead_conn_timeout`, then fails. `NBD_CMD_DISCONNECT` ends that waiting.
- `NBD_CMD_RECONFIGURE` puts each socket in the place of a dead one, and drops it where none is dead, saying the same.
  So the keeper may offer more than are needed, and needn't know which died.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from nbd import wire
from nbd.channel import GoneError
from nbd.client import describe
from nbd.negotiate import Terms
from terrace.attach.driver import LOGICAL_BLOCK_BYTES, Attached, Order
from terrace.attach.netlink import Attribute, Family, attributes_in, messages_in, number, u64
from terrace.attach.record import AttachError, Records
from terrace.daemonexports import DaemonExports, daemon_exports, gone

log = logging.getLogger("terrace.attach")

FAMILY: Final = "nbd"
GROUP: Final = "nbd_mc_group"
CMD_CONNECT: Final = 1
CMD_DISCONNECT: Final = 2
CMD_RECONFIGURE: Final = 3
CMD_LINK_DEAD: Final = 4
CMD_STATUS: Final = 5
ATTR_INDEX: Final = 1
ATTR_SIZE_BYTES: Final = 2
ATTR_BLOCK_SIZE_BYTES: Final = 3
ATTR_TIMEOUT: Final = 4
ATTR_SERVER_FLAGS: Final = 5
ATTR_CLIENT_FLAGS: Final = 6
ATTR_SOCKETS: Final = 7
ATTR_DEAD_CONN_TIMEOUT: Final = 8
ATTR_DEVICE_LIST: Final = 9
ATTR_BACKEND_IDENTIFIER: Final = 10
DEVICE_ITEM: Final = 1
DEVICE_INDEX: Final = 1
DEVICE_CONNECTED: Final = 2
SOCK_ITEM: Final = 1
SOCK_FD: Final = 1

IO_TIMEOUT_MS: Final = 3000
"""After a restart of the daemon what was in flight is sent again at the latest so long after it was sent."""
IO_TIMEOUT_SEVERAL_MS: Final = 5000
"""The same with several connections, where a request may not take longer without being started anew."""
SIZE_INTERVAL_S: Final = 5.0
"""How often the volume's size is looked at, if nobody asks for it."""
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0
GONE_PATIENCE_S: Final = 10.0

SYSFS: Final = Path("/sys/block")


class Kernel:
    """The kernel's NBD client. Its methods block for as long as the kernel takes: call them from a thread."""

    def __init__(self) -> None:
        """Raises OSError: ENOENT where the kernel has none, even after `modprobe nbd`."""
        try:
            self._family = Family(FAMILY)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            _load_module()
            self._family = Family(FAMILY)

    def connect(
        self, sockets: Sequence[socket.socket], terms: Terms, *, read_only: bool, dead_timeout_s: int, backend: str
    ) -> int:
        """Make a device of connected sockets, which the kernel keeps; returns its number."""
        answer = self._family.ask(
            CMD_CONNECT,
            [
                (ATTR_SIZE_BYTES, u64(_whole_blocks(terms.size_bytes))),
                (ATTR_BLOCK_SIZE_BYTES, u64(LOGICAL_BLOCK_BYTES)),
                (ATTR_TIMEOUT, u64(0)),
                (ATTR_DEAD_CONN_TIMEOUT, u64(dead_timeout_s)),
                (ATTR_SERVER_FLAGS, u64(terms.flags | (wire.READ_ONLY if read_only else 0))),
                (ATTR_CLIENT_FLAGS, u64(0)),
                (ATTR_BACKEND_IDENTIFIER, backend),
                (ATTR_SOCKETS, _sockets(sockets)),
            ],
        )
        return number(answer[ATTR_INDEX])

    def offer(self, index: int, backend: str, sockets: Sequence[socket.socket], size_bytes: int) -> None:
        """Give the device connected sockets for those of its connections that are dead, and its size."""
        attributes: list[Attribute] = [
            (ATTR_INDEX, index),
            (ATTR_SIZE_BYTES, u64(_whole_blocks(size_bytes))),
            (ATTR_BACKEND_IDENTIFIER, backend),
        ]
        self._family.ask(CMD_RECONFIGURE, [*attributes, (ATTR_SOCKETS, _sockets(sockets))] if sockets else attributes)

    def disconnect(self, index: int) -> None:
        """End the device; what waits in it fails."""
        self._family.ask(CMD_DISCONNECT, [(ATTR_INDEX, index)])

    def connected(self, index: int) -> bool:
        """Whether the device is one at present."""
        answer = self._family.ask(CMD_STATUS, [(ATTR_INDEX, index)])
        for kind, item in attributes_in(answer.get(ATTR_DEVICE_LIST, b"")):
            told = dict(attributes_in(item))
            if kind == DEVICE_ITEM and number(told[DEVICE_INDEX]) == index:
                return bool(number(told[DEVICE_CONNECTED]))
        return False

    def links(self) -> socket.socket:
        """Where LINK_DEAD is told, of every device."""
        return self._family.subscribe(GROUP)


def available() -> OSError | None:
    """None if this kernel has an NBD client that we may use, else why not. Loads the module where that helps."""
    try:
        Kernel()
    except OSError as error:
        return error
    return None


def find_device(backend: str) -> int | None:
    """The number of the device that belongs to `backend`, whoever made it; None if there is none."""
    for path in SYSFS.glob("nbd*/backend"):
        try:
            if path.read_text().rstrip("\n") == backend:
                return int(path.parent.name.removeprefix("nbd"))
        except OSError:
            continue  # it has just gone
    return None


def find_left_device(order: Order) -> int | None:
    """The device of an order that a keeper left in the kernel.

    Kernels before 5.14 keep no `backend`. There it is the one that is recorded, if it is a device at present.
    """
    index = find_device(order.identifier)
    if index is not None:
        return index
    record = Records(order.directory).find(order.name)
    if record is None or record.driver != "nbd":
        return None
    index = index_of(record.device)
    return index if is_device_of(order.identifier, index) else None


def is_device_of(backend: str, index: int) -> bool:
    """Whether a device that once was `backend`'s is so still; others may have ended it and use its number."""
    sysfs = SYSFS / f"nbd{index}"
    try:
        return (sysfs / "backend").read_text().rstrip("\n") == backend
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        # A newer kernel would say so. To an older one it is whatever device has the number.
        return not _keeps_backends() and (sysfs / "pid").exists()


def _keeps_backends() -> bool:
    major, minor = (int("".join(filter(str.isdecimal, part)) or 0) for part in os.uname().release.split(".")[:2])
    return (major, minor) >= (5, 14)


def index_of(device: str) -> int:
    """The number of `/dev/nbdN`."""
    return int(Path(device).name.removeprefix("nbd"))


def device_path(index: int) -> str:
    return f"/dev/nbd{index}"


def disconnect(index: int) -> None:
    """End a device whose keeper is gone. Blocks."""
    Kernel().disconnect(index)
    tell_udev(index)


def tell_udev(index: int) -> None:
    """Have the rules looked at again: the kernel's own event comes before `backend` is there, by which they go."""
    with suppress(OSError):
        (SYSFS / f"nbd{index}" / "uevent").write_text("change")


@asynccontextmanager
async def attached(order: Order) -> AsyncIterator[Attached]:
    """Make the device, or take over the one that a keeper left. See `terrace.attach.driver`."""
    kernel = await trio.to_thread.run_sync(Kernel)
    async with daemon_exports(order.home) as exports:
        with kernel.links() as links:
            left = find_left_device(order)
            if left is None:
                identity = (await exports.export(order.name)).identity
                index = await _connect(kernel, order, exports, identity)
            else:
                index = left
                log.info("%s: taking over %s", order.name, device_path(index))
                # Where the keeper died before it had recorded that, it is what it is now.
                record = Records(order.directory).find(order.name)
                identity = (record and record.identity) or (await exports.export(order.name)).identity
            is_ours = partial(is_device_of, order.identifier, index)
            found = Attached(device_path(index), is_ours, outlives=True, identity=identity)
            watch = _Watch(kernel, order, exports, index, found, identity)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch.links, links)
                    nursery.start_soon(watch.connections)
                    nursery.start_soon(watch.size)
                    if left is not None:
                        watch.dead.set()  # nobody knows which of its connections died meanwhile
                    else:
                        await trio.to_thread.run_sync(_set_timer, index, order.connections)
                        await trio.to_thread.run_sync(tell_udev, index)
                    yield found
                    nursery.cancel_scope.cancel()
            finally:
                # Once it was given up, or ended by others, the kernel may have given its number to somebody's device.
                if not found.leave and not watch.over and found.is_ours():
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(kernel.disconnect, index)
                        await _wait_until_gone(index)
                        await trio.to_thread.run_sync(tell_udev, index)


async def _connect(kernel: Kernel, order: Order, exports: DaemonExports, identity: str) -> int:
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for _ in range(order.connections):
            sock, terms = await exports.connect(order.name, identity)
            opened.enter_context(sock)
            sockets.append(sock)
            if not terms.flags & wire.CAN_MULTI_CONN:
                break
        connect = partial(
            kernel.connect,
            sockets,
            terms,
            read_only=order.read_only,
            dead_timeout_s=order.dead_timeout_s,
            backend=order.identifier,
        )
        try:
            return await trio.to_thread.run_sync(connect)
        except OSError as error:
            raise AttachError(
                error.errno or errno.EIO,
                f"the kernel made no NBD device for {order.name}: {error.strerror}"
                + ("; run as root" if error.errno == errno.EPERM else "; dmesg may say more"),
            ) from None


class _Watch:
    """What a keeper does while the device is there."""

    def __init__(
        self, kernel: Kernel, order: Order, exports: DaemonExports, index: int, found: Attached, identity: str
    ) -> None:
        self.dead = trio.Event()
        self.over = False
        """The volume is another one, so the device was given up."""
        self._exports = exports
        self._identity = identity
        self._kernel = kernel
        self._order = order
        self._index = index
        self._found = found
        self._size_bytes = -1

    async def links(self, links: socket.socket) -> None:
        """Hear of connections that ended."""
        while True:
            await trio.lowlevel.wait_readable(links)
            try:
                for message in messages_in(links.recv(32 << 10)):
                    if message.command == CMD_LINK_DEAD and number(message.attributes[ATTR_INDEX]) == self._index:
                        self.dead.set()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    log.warning("can't hear what the kernel says of its NBD devices: %s", error)
                    await trio.sleep(LONGEST_PAUSE_S)
                self.dead.set()  # something was told that we have not heard

    async def connections(self) -> None:
        """Give the kernel new connections for dead ones, as soon as there is a daemon to connect to."""
        while True:
            await self.dead.wait()
            await trio.sleep(FIRST_PAUSE_S)  # where a daemon ends, all connections do
            # Before the first offer: what dies from here on is told anew.
            self.dead = trio.Event()
            log.info("%s: a connection of %s ended; connecting again", self._order.name, self._found.device)
            pause_s, said = FIRST_PAUSE_S, ""
            while True:
                try:
                    for _ in range(self._order.connections):
                        await self._offer()
                except GoneError as error:
                    await self._give_up(error)
                    return
                except OSError as error:
                    if str(error) != said:
                        said = str(error)
                        log.info("%s: not yet: %s", self._order.name, error.strerror or error)
                    await trio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                else:
                    log.info("%s: connected again", self._order.name)
                    break

    async def _give_up(self, why: GoneError) -> None:
        """End the device, so that what is asked of it fails, and nothing of it reaches another volume."""
        if self.over:
            return
        self.over = True
        log.error("%s", why)
        if not self._found.is_ours():
            return
        await trio.to_thread.run_sync(self._kernel.disconnect, self._index)
        await _wait_until_gone(self._index)
        await trio.to_thread.run_sync(tell_udev, self._index)

    async def _offer(self) -> None:
        sock, terms = await self._exports.connect(self._order.name, self._identity)
        with sock:
            self._size_bytes = terms.size_bytes
            await trio.to_thread.run_sync(
                self._kernel.offer, self._index, self._order.identifier, [sock], terms.size_bytes
            )

    async def size(self) -> None:
        """Give the device the volume's size when that changes.

        And notice a daemon that was away, should the kernel's word of it have been lost, as it is in a network
        namespace, where its messages don't come.
        """
        away = False
        while True:
            look = self._found.look
            with trio.move_on_after(SIZE_INTERVAL_S):
                await look.wait()
            if not self.over and not self._found.is_ours():
                raise AttachError(
                    errno.ENODEV,
                    f"{self._found.device} is not the device of {self._order.name} any more: somebody disconnected it",
                )
            try:
                terms = await describe(self._order.address, self._order.name)
                now = (await self._exports.export(self._order.name)).identity
                if now != self._identity:
                    await self._give_up(gone(self._order.name, self._identity, now))
                    return
                if terms.size_bytes != self._size_bytes:
                    await trio.to_thread.run_sync(
                        self._kernel.offer, self._index, self._order.identifier, [], terms.size_bytes
                    )
                    self._size_bytes = terms.size_bytes
            except OSError as error:
                away = True
                log.debug("%s: its size can't be told: %s", self._order.name, error)
            else:
                if away:
                    self.dead.set()
                away = False


def _sockets(sockets: Sequence[socket.socket]) -> list[Attribute]:
    return [(SOCK_ITEM, [(SOCK_FD, sock.fileno())]) for sock in sockets]


def _whole_blocks(size_bytes: int) -> int:
    return size_bytes // LOGICAL_BLOCK_BYTES * LOGICAL_BLOCK_BYTES


def _set_timer(index: int, connections: int) -> None:
    timer_ms = IO_TIMEOUT_MS if connections == 1 else IO_TIMEOUT_SEVERAL_MS
    path = SYSFS / f"nbd{index}" / "queue" / "io_timeout"
    try:
        path.write_text(str(timer_ms))
    except OSError as error:
        # Then it is what the kernel makes it, 30 s: longer pauses, nothing else.
        log.warning("%s can't be set (%s): after a restart of the daemon I/O pauses longer", path, error.strerror)


async def _wait_until_gone(index: int) -> None:
    with trio.move_on_after(GONE_PATIENCE_S):
        while (SYSFS / f"nbd{index}" / "pid").exists():  # noqa: ASYNC110 - the kernel has no event for it
            await trio.sleep(0.02)


def _load_module() -> None:
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if modprobe is not None and os.geteuid() == 0:
        subprocess.run([modprobe, "--quiet", "nbd"], capture_output=True, check=False)
