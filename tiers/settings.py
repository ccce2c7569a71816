"""What an operator may tune about a pool. The defaults suit a machine with a few gigabytes of memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolSettings:
    """Bounds and intervals; bytes and seconds."""

    checkpoint_interval_s: float = 30.0
    """A checkpoint at least this often while there is something to record."""
    checkpoint_log_bytes: int = 1 << 30
    """A checkpoint after this much log, which bounds the replay after a crash."""
    overlay_entries: int = 1 << 18
    """Map entries not yet in pages, over all volumes; half of it starts a checkpoint, all of it holds writers back."""
    unsynced_cap_bytes: int = 128 << 20
    """What a power cut could take from a device at most; writers wait at it."""
    map_cache_bytes: int = 64 << 20
    """Clean map pages in memory, over all volumes."""
    small_volume_leaves: int = 8192
    """In a volume of up to so many map pages of 1 MiB each (8 GiB) even single blocks are kept by page in memory."""
    compression_level: int | None = None
    """zstd's, for what is moved to base, over all policies (0: none); None: each volume's policy decides."""
    pack_after_s: float = 60.0
    """What the log left on the base tier, since the fast one had no room, is compressed when it has rested so long."""
    overcommit_limit: float = 0.0
    """Nominal size of all volumes over the pool's capacity, at most; 0: no limit."""
    scrub_rate_bytes: int = 0
    """Bytes a second that a scrub reads, over all devices, unless it is started with another rate; 0: no limit."""
    heat_half_life_s: float = 3600.0
    """Counts of reads and writes are halved so often."""
    heat_bytes: int = 256 << 20
    """Counters of extents, over all volumes, 32 MiB for each TiB that is in use; beyond it the coldest are dropped."""
    heat_save_interval_s: float = 300.0
    """What a crash forgets of them."""
