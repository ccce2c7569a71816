"""The pace of clients' writes while room is short: they use it up smoothly, not at once and then wait for more.

The cleaner gives room back in rounds. Over a slow device, which has to be read and synced, a round takes half a second.
Clients that take what a round has gained at full speed are through with it long before the next one ends, and then all
of them stand still. So while the pool is short of room, and rounds are long, writes may use up at most the present room
in the time of a few rounds (`spread_s`): who takes a part of the room pays for it with that part of the time. With half
of the room left they go less than half as fast, and it is hardly ever used up. At the upper end of the margin in which
the cleaner works it costs nothing, so that a load that the cleaner can bear, resting now and then, isn't held up. And
nothing is lost by it: where the cleaner gains more than is used, room grows until the pace is no limit, and where it
gains less, clients have to wait in any case.

Debt is counted in time, not in blocks, and what one write adds to it is bounded (`MOST_DEBT_S`): none holds up the next
for long.

Writes that arrive together are logged together, with one header; one at a time they would cost twice as much room. So
they go in gulps: freely until they owe `GULP_S`, then not at all until that is paid. Who must wait waits in a line, and
goes in the order of it; while anybody is in the line nobody overtakes, but for one that may go with the first (what
came together waits in the line as its first write).

No IO and no waiting here: the time and the room come in, answers go out.
"""

SPREAD_ROUNDS = 3
"""A round may gain little, or take longer than those before it, since a checkpoint comes in between."""
LEAST_SPREAD_S = 0.2
"""Where rounds are so short that it comes to less, nobody notices them."""
MOST_SPREAD_S = 1.5
FADE_S = 1.0
"""What a long round took counts for half as much after so much work in shorter ones."""
GULP_S = 0.03
MOST_DEBT_S = 0.2
SAVED_S = 0.01
"""Time that was not used counts for what comes later up to this much."""
LATELY_S = 0.1
"""Longer than a gulp and what is paid after it: in between nobody waits, and yet writes are held back."""


class Pace:
    """The pace of one pool's writes."""

    __slots__ = ("_closed", "_paid_until_s", "_passes", "_passes_until_s", "_refused_s", "_round_s", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        """How many are in the line."""
        self._round_s = 0.0
        self._paid_until_s = 0.0
        self._closed = False
        self._refused_s = -LATELY_S
        self._passes = 0
        self._passes_until_s = 0.0

    def round_took(self, seconds: float) -> None:
        """A round of the cleaner has worked for so long."""
        self._round_s = max(seconds, self._round_s * 0.5 ** (seconds / FADE_S))

    @property
    def spread_s(self) -> float:
        """In how much time the room may be used up at most; 0: in no time."""
        spread_s = SPREAD_ROUNDS * self._round_s
        return min(spread_s, MOST_SPREAD_S) if spread_s >= LEAST_SPREAD_S else 0.0

    def may_go(self, now_s: float) -> bool:
        """Whether a write may be logged now. What it takes is told with `took`, before the next one asks."""
        if self._passes and now_s <= self._passes_until_s:
            return True
        if not self.waiting and self.turn_in_s(now_s) <= 0:
            return True
        self._refused_s = now_s
        return False

    def took(self, slots: int, room_slots: int, margin_slots: int, now_s: float) -> None:
        """What was let go has taken so many slots of the room that there was before, which is less than the margin."""
        self._passes = max(0, self._passes - 1)
        scarcity = max(0.0, 1 - room_slots / margin_slots)
        debt_s = min(MOST_DEBT_S, self.spread_s * scarcity * slots / max(slots, room_slots))
        self._paid_until_s = max(self._paid_until_s, now_s - SAVED_S) + debt_s
        self._closed = self._paid_until_s > now_s + GULP_S

    def turn_in_s(self, now_s: float) -> float:
        """Seconds until the first in line may go; 0 or less: now."""
        return self._paid_until_s - now_s if self._closed else 0.0

    def take_turn(self, now_s: float) -> None:
        """The first in line goes, and one more soon after it."""
        self._closed = False
        self._passes, self._passes_until_s = 2, now_s + SAVED_S

    def holds_back(self, now_s: float) -> bool:
        """Whether writes wait, or had to lately."""
        return self.waiting > 0 or now_s - self._refused_s < LATELY_S
