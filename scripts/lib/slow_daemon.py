"""terraced with base devices at a hard disk's pace (`slow_disk`). Takes terraced's options."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from slow_disk import SlowHost

from terrace.daemon import main
from tiers import Pool


class SlowPool(Pool):
    """A pool on a `SlowHost`."""

    @staticmethod
    def open(directory: Path, **options: Any) -> AbstractAsyncContextManager[Pool]:
        return Pool.open(directory, host=SlowHost(), **options)


if __name__ == "__main__":
    sys.exit(main(engine=SlowPool))
