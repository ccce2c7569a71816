"""Python's garbage collector in a process that serves clients: seldom, and not over what start-up made."""

from __future__ import annotations

import gc

# Objects that come and go between two youngest collections. The default of 700 would run the collector thousands of
# times a second under load; the engine makes no cycles, so there is little to find.
GC_THRESHOLDS = (50_000, 20, 50)


def settle_collector() -> None:
    """Take what start-up made out of the garbage collector's sight, and let it look less often.

    A full collection of the modules alone takes tens of milliseconds, in which no client is served.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
