"""The keeper: the process that has an attachment, from the device's coming to its going.

In order, up: the lock (one keeper for each name), the device, the record, the link, the filesystem if one is wanted,
then "it is there". Down, at SIGTERM or SIGINT: wait until nothing uses the device, then the record, so that nobody is
told of a device that goes, the link, the device. A second signal doesn't wait: then an NBD device stays in the kernel,
as it does when the keeper is killed, and the next `terrace attach` takes it over; a FUSE file goes, and its device
fails. A keeper that fails, whatever the reason, leaves an NBD device that is in use as well: it may have been taken
over with what is mounted.

SIGHUP makes it look at the volume's size at once.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

from terrace import sdnotify
from terrace.attach import filesystem, links
from terrace.attach.driver import Attached, Driver, Order
from terrace.attach.record import AttachError, Record, Records

log = logging.getLogger("terrace.attach")

UNUSED_POLL_S: Final = 0.25


async def keep(
    order: Order,
    driver_name: str,
    driver: Driver,
    *,
    ready: Callable[[str], None],
    prepare: Callable[[str], None] = lambda device: None,
) -> None:
    """Keep `order` attached until told to stop.

    `prepare` makes and mounts a filesystem, in a thread, for the device is used by it; `ready` is called with the
    device when all that is done. Raises OSError with a sentence where it can't be attached; nothing is left then.
    """
    records = Records(order.directory)
    with (
        records.held(order.name),
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as stops,
        trio.open_signal_receiver(signal.SIGHUP) as looks,
    ):
        async with driver(order) as found:
            link = links.make(order.name, found.device)
            record = Record(
                name=order.name,
                driver=driver_name,
                device=found.device,
                read_only=order.read_only,
                connections=order.connections,
                link=link,
                since=time.time(),
                identity=found.identity,
                keeper=os.getpid(),
            )
            try:
                records.store(record)
                await trio.to_thread.run_sync(prepare, found.device)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_look_when_told, looks, found)
                    log.info("%s is attached as %s", order.name, found.device)
                    ready(found.device)
                    sdnotify.notify("READY=1")
                    await anext(stops)
                    sdnotify.notify("STOPPING=1")
                    await _wait_until_unused(order, found, stops)
                    nursery.cancel_scope.cancel()
            except BaseException:
                with trio.CancelScope(shield=True):
                    if found.outlives and await _in_use(order, found):
                        log.warning("%s: %s is in use, and stays", order.name, found.device)
                        found.leave = True
                raise
            finally:
                if not found.leave:
                    records.forget(order.name)
                    links.remove(link, found.device)
        if not found.leave:
            log.info("%s is detached", order.name)


async def _require_unused(order: Order, found: Attached) -> None:
    # In a thread: who closes a device last may have to write, and it may be this program that serves that.
    await trio.to_thread.run_sync(filesystem.require_unused, found.device, order.name)


async def _in_use(order: Order, found: Attached) -> bool:
    try:
        await _require_unused(order, found)
    except OSError:
        return True
    return False


async def _look_when_told(looks: AsyncIterator[int], found: Attached) -> None:
    async for _ in looks:
        found.look_now()


async def _wait_until_unused(order: Order, found: Attached, stops: AsyncIterator[int]) -> None:
    """Until nothing uses the device, or a second signal comes: then the device is left."""
    said = ""
    async with trio.open_nursery() as nursery:

        async def hurry() -> None:
            await anext(stops)
            log.warning("%s: leaving %s as it is", order.name, found.device)
            found.leave = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(hurry)
        while found.is_ours():
            try:
                await _require_unused(order, found)
            except AttachError as error:
                if error.errno != errno.EBUSY:
                    raise
                if str(error) != said:
                    said = str(error)
                    log.warning("waiting: %s", error)
                await trio.sleep(UNUSED_POLL_S)
            else:
                break
        nursery.cancel_scope.cancel()
