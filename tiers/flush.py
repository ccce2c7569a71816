"""Flushing: which records are durable, and the syncs that make them so.

A flush captures the log's sequence on the trio thread and is done when every device that was dirty at or below it has
been synced (design rule 2). Each device has rounds of its own: a round takes all that was written to the device before
it begins. A flush that finds a device written to since its last round began waits for that device's next round, never
for the one that is running; if nothing was written since, the one that is running has it all. So any number of flushes
share a round, and a slow device holds up only those that need it.

**What a client's flush needs** is the devices that hold log records up to its sequence, and what these records name.
Copies that the mover has written and no record names yet are not among that: they are *unnamed*
(`Device.unnamed_bytes`), and `flush` passes over a device that holds nothing else. The rule stays true because a copy
is never named while it is unnamed: the mover itself syncs the devices of its copies (`flush_devices`) after the last
of them was written and before it logs the MOVE record. So when a record exists, all that it names is durable or, if it
is data of the batch itself, on the record's own device. A crash before the record leaves copies that nothing names,
durable or not. What is written in any other way (the log, map pages, copies of the catalog, labels) counts as named at
once. That is what keeps demotion to a slow base device out of the way of clients' flushes.

Unsynced bytes are bounded for each device by `cap_bytes`, and where it is slow by what it syncs in `MOST_SYNC_S`: who
needs a round waits for the one that is running, too. Past a quarter of the bound a round starts by itself, and at the
bound those are held back who would write there: clients by `room`, if it is a device that holds named bytes, the mover
by `room_on`. A device whose sync fails is poisoned, and every flush from then on fails.
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from tiers.device import Device
from tiers.errors import TierError
from tiers.failpoint import hit

logger = logging.getLogger(__name__)

MOST_SYNC_S = 0.2
"""What a device may have to sync takes it so long at most, as fast as it was lately."""
LEAST_CAP_BYTES = 8 << 20
MEASURED_BYTES = 1 << 20
"""A round of less says more of the seeks than of the rate."""


class _Lane:
    """The rounds of one device."""

    __slots__ = ("begun", "cap", "ended", "in_flight", "names", "running", "wanted")

    def __init__(self, cap: int) -> None:
        self.begun = 0
        self.ended = 0
        self.cap = cap
        """Bytes that may be unsynced."""
        self.in_flight = 0
        """Bytes that the running round covers: not safe yet."""
        self.names = False
        """Whether the running round covers bytes that something names."""
        self.running = False
        self.wanted = False


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
        self._on_poison = on_poison
        self._on_round = on_round
        self._round_done = trio.lowlevel.ParkingLot()
        self._wanted = trio.Event()
        self._lanes: dict[int, _Lane] = {}
        self._poisoning = trio.Lock()

    def room(self) -> bool:
        """Whether clients may go on: no device that holds something named has reached its cap of unsynced bytes.

        Starts a round early if need be.
        """
        for device in self.devices:
            if device.unsynced_bytes >= self._lane(device).cap // 4:
                self._want(device)
                if self._is_full(device) and self._names(device):
                    return False
        return True

    async def room_on(self, device: Device) -> None:
        """Return when a large write to `device` would not exceed its cap. Raises TierError if it never will."""
        while self._is_full(device):
            if self.failure is not None:
                raise TierError(errno.EIO, str(self.failure))
            self._want(device)
            await self._round_done.park()

    async def flush(self) -> None:
        """Return when all that was logged before this call is durable, and all that was written but unnamed copies.

        Raises TierError if it never will be.
        """
        # No checkpoint until `_sync` waits: the sequence and what has to be synced belong to one moment.
        seq = self._seq()
        await self._sync([device for device in self.devices if self._names(device)])
        self.durable_seq = max(self.durable_seq, seq)

    async def flush_all(self) -> None:
        """`flush`, and unnamed copies too: what a checkpoint commits on (design rule 1). Raises TierError."""
        seq = self._seq()
        await self._sync(self.devices, unnamed=True)
        self.durable_seq = max(self.durable_seq, seq)

    async def flush_devices(self, devices: Iterable[Device]) -> None:
        """Return when all that was written to these devices before this call is durable, named or not.

        Raises TierError if it never will be.
        """
        await self._sync(devices, unnamed=True)

    def fail(self, why: TierError) -> None:
        """Nothing will be flushed any more: whoever waits, or asks later, is told why."""
        self.failure = self.failure or why
        self._round_done.unpark_all()

    async def device_left(self, device: Device) -> None:
        """A device has been taken out of `devices`, since nothing lies there: nobody waits for it any more.

        When this returns it isn't being synced any more, and may be closed.
        """
        self._round_done.unpark_all()
        while self._lane(device).running:
            await self._round_done.park()

    def _round_for(self, device: Device, *, unnamed: bool) -> tuple[_Lane, int]:
        """The round that covers what was written to a device by now: the next one, unless nothing waits for it."""
        lane = self._lane(device)
        waiting = device.unsynced_bytes > (0 if unnamed else device.unnamed_bytes)
        return lane, lane.begun + 1 if waiting else lane.begun

    async def _sync(self, devices: Iterable[Device], *, unnamed: bool = False) -> None:
        """Return when what was written to these devices by now is durable, as far as they stay in the pool."""
        need = [(device, *self._round_for(device, unnamed=unnamed)) for device in devices]
        if not need:
            await trio.lowlevel.checkpoint()
        for device, lane, number in need:
            while lane.ended < number and self.failure is None and device in self.devices:
                lane.wanted = lane.wanted or lane.begun < number
                self._wanted.set()
                await self._round_done.park()
        if self.failure is not None:
            raise TierError(errno.EIO, str(self.failure))

    def _lane(self, device: Device) -> _Lane:
        lane = self._lanes.get(device.index)
        if lane is None:
            lane = self._lanes[device.index] = _Lane(self._cap)
        return lane

    def _names(self, device: Device) -> bool:
        """Whether a device holds unsynced bytes that something may name."""
        return device.unsynced_bytes > device.unnamed_bytes or self._lane(device).names

    def _is_full(self, device: Device) -> bool:
        lane = self._lane(device)
        return device.unsynced_bytes + lane.in_flight >= lane.cap

    def _want(self, device: Device) -> None:
        self._lane(device).wanted = True
        self._wanted.set()

    async def run(self) -> None:
        """The task: starts the rounds that are wanted, one at a time on each device."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                for device in self.devices:
                    lane = self._lane(device)
                    if lane.wanted and not lane.running:
                        lane.wanted, lane.running = False, True
                        nursery.start_soon(self._run_round, device, lane)

    async def _run_round(self, device: Device, lane: _Lane) -> None:
        try:
            await self._round(device, lane)
        finally:
            lane.running = False
            if lane.wanted:
                self._wanted.set()

    def _measure(self, lane: _Lane, took_s: float) -> None:
        """Let what a round took say how much may be unsynced; half of what it says, so that one of them isn't all."""
        if lane.in_flight >= MEASURED_BYTES:
            wanted = self._cap if took_s <= 0 else int(min(self._cap, lane.in_flight / took_s * MOST_SYNC_S))
            lane.cap = min(self._cap, max(LEAST_CAP_BYTES, (lane.cap + wanted) // 2))

    async def _round(self, device: Device, lane: _Lane) -> None:
        # No checkpoint between here and the sync: a round covers what is dirty at one moment.
        lane.begun += 1
        # What is being synced isn't safe yet: it counts against the cap until the round is over.
        lane.in_flight, device.unsynced_bytes = device.unsynced_bytes, 0
        lane.names, device.unnamed_bytes = lane.names or lane.in_flight > device.unnamed_bytes, 0
        hit("flush.begun")
        begun_s = trio.current_time()
        failed: OSError | None = None
        # Shielded: the kernel tells of a failed sync once, so its answer must be heard even while the pool closes.
        try:
            with trio.CancelScope(shield=True):
                if lane.in_flight and not device.poisoned:
                    try:
                        await device.sync()
                    except OSError as error:
                        failed = error
        except BaseException:
            # No thread, no memory: it isn't known what was synced, so all of it still has to be.
            device.unsynced_bytes += lane.in_flight
            raise
        hit("flush.synced")
        if failed is not None:
            device.poisoned = f"a flush failed ({failed}), so what it holds can't be trusted to be durable"
            self.failure = TierError(
                errno.EIO,
                f"{device.path} failed a flush and is poisoned: copy what you need, and replace it ({failed})",
            )
            logger.error("%s", self.failure)
            with trio.CancelScope(shield=True):
                async with self._poisoning:
                    await self._on_poison(device)
        self._measure(lane, trio.current_time() - begun_s)
        lane.in_flight = 0
        lane.names = False
        self.rounds += 1
        lane.ended = lane.begun
        hit("flush.done")
        self._round_done.unpark_all()
        self._on_round()
