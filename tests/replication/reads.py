"""How clients read a mirror."""

from __future__ import annotations

from replication.mirror import Mirror


async def read_as_clients_do(mirror: Mirror, offset: int, into: memoryview) -> None:
    """As `nbd.connection` does for a pass of one READ."""
    lent = mirror.lend_reads()
    try:
        done = (lent or mirror.read_now)(offset, len(into), into)
    except OSError:
        if lent is None:
            raise
        done = False
    if not done:
        await mirror.read(offset, len(into), into)
    elif lent is not None:
        mirror.took_reads(1, len(into))
