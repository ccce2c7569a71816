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
