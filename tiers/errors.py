"""The one error that leaves the engine: an `OSError` whose text is a sentence for the operator.

Each names the thing that is wrong, what was expected or found, and the next step. The errno is true, so that an
NBD server can turn any failure into the right protocol error without knowing this package.
"""

import errno


class TierError(OSError):
    """An `OSError` that prints as its sentence alone, without the bracketed errno."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.args[1])


class NoRoomError(TierError):
    """ENOSPC: the pool has no room for a write now. Deletes, trims and more devices make some."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)


class DamagedPageError(TierError):
    """EIO: a page of a map fails its checksum."""

    def __init__(self, pool_name: str, damage: str) -> None:
        super().__init__(
            errno.EIO,
            f"{damage}: `terrace pool check {pool_name}` tells which others do, and with --give-up-map gives up what "
            "they name",
        )
        self.damage = damage
        """What is wrong, without what can be done."""


def ends_writing(pool_name: str, since: str, error: OSError) -> str:
    """Why a pool takes no writes any more, with one next step. `since`: what has failed with `error`."""
    says = f"the pool {pool_name} takes no writes, since {since}"
    if isinstance(error, DamagedPageError):
        step = f"`terrace pool check {pool_name} --give-up-map` gives up what lies below such pages"
        return f"{says}: {error.damage}; {step}, and the pool takes writes again"
    return f"{says}: {error}; mend that and restart"
