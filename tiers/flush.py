"""Flushing: which records are durable, and the one task that makes them so.

A flush captures the log's sequence on the trio thread and is done when every device that was dirty at or below it has
been synced. Syncs run in rounds: a round takes the devices that are dirty when it begins and covers the sequence of
that moment; a flush that arrives while a round runs waits for the next one, never for that one. So any number of
flushes share a round.

Unsynced bytes per device are bounded: past `early_bytes` a round starts by itself, and at `cap_bytes` writers are held
back (`room`). A device whose sync fails is poisoned, and every flush from then on fails.
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from tiers.device import Device
from tiers.errors import TierError
from tiers.failpoint import hit

logger = logging.getLogger(__name__)


class Flusher:
    """Owns `durable_seq`, and alone calls `sync` on a pool's devices while clients are served."""

    def __init__(
        self,
        devices: Sequence[Device],
        seq: Callable[[], int],
        *,
        cap_bytes: int,
        on_poison: Callable[[Device], Awaitable[None]],
        on_round: Callable[[], None],
    ) -> None:
        self.devices = devices
        self.durable_seq = 0
        self.rounds = 0
        self.failure: TierError | None = None
        self._seq = seq
        self._cap = cap_bytes
        self._early = cap_bytes // 4
        self._on_poison = on_poison
        self._on_round = on_round
        self._round_done = trio.lowlevel.ParkingLot()
        self._wanted = trio.Event()
        self._in_flight: dict[int, int] = {}
        self._begun = 0
        self._ended = 0

    def room(self) -> bool:
        """Whether writers may go on: no device has reached its cap of unsynced bytes.

        Starts a round early if need be.
        """
        for device in self.devices:
            if device.unsynced_bytes >= self._early:
                self._wanted.set()
                if device.unsynced_bytes + self._in_flight.get(device.index, 0) >= self._cap:
                    return False
        return True

    async def flush(self) -> None:
        """Return when all that was logged or written before this call is durable.

        Raises TierError if it never will be.
        """
        seq = self._seq()
        if (
            self.failure is None
            and self._begun == self._ended
            and self.durable_seq >= seq
            and not any(device.unsynced_bytes for device in self.devices)
        ):
            await trio.lowlevel.checkpoint()
            return
        need = self._begun + 1
        while self._ended < need:
            if self.failure is not None:
                raise TierError(errno.EIO, str(self.failure))
            self._wanted.set()
            await self._round_done.park()
        if self.failure is not None:
            raise TierError(errno.EIO, str(self.failure))

    def fail(self, why: TierError) -> None:
        """Nothing will be flushed any more: whoever waits, or asks later, is told why."""
        self.failure = self.failure or why
        self._round_done.unpark_all()

    async def run(self) -> None:
        """The task: one round after another, as long as they are wanted."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            await self._round()

    async def _round(self) -> None:
        # No checkpoint between here and the first sync: the sequence and the dirty devices belong to one moment.
        seq = self._seq()
        self._begun += 1
        dirty = [device for device in self.devices if device.unsynced_bytes and not device.poisoned]
        # What is being synced isn't safe yet: it counts against the cap until the round is over.
        self._in_flight = {device.index: device.unsynced_bytes for device in dirty}
        for device in dirty:
            device.unsynced_bytes = 0
        hit("flush.begun")
        errors: list[tuple[Device, OSError]] = []

        async def sync(device: Device) -> None:
            try:
                await device.sync()
            except OSError as error:
                errors.append((device, error))

        # Shielded: the kernel tells of a failed sync once, so its answer must be heard even while the pool closes.
        try:
            with trio.CancelScope(shield=True):
                if len(dirty) == 1:
                    await sync(dirty[0])
                else:
                    async with trio.open_nursery() as nursery:
                        for device in dirty:
                            nursery.start_soon(sync, device)
        except BaseException:
            # No thread, no memory: it isn't known what was synced, so all of it still has to be.
            for device in dirty:
                device.unsynced_bytes += self._in_flight[device.index]
            raise
        hit("flush.synced")
        for device, error in errors:
            device.poisoned = f"a flush failed ({error}), so what it holds can't be trusted to be durable"
            self.failure = TierError(
                errno.EIO, f"{device.path} failed a flush and is poisoned: copy what you need, and replace it ({error})"
            )
            logger.error("%s", self.failure)
            with trio.CancelScope(shield=True):
                await self._on_poison(device)
        if self.failure is None:
            self.durable_seq = max(self.durable_seq, seq)
        self._in_flight = {}
        self.rounds += 1
        self._ended = self._begun
        hit("flush.done")
        self._round_done.unpark_all()
        self._on_round()
