"""A `terraced` process over `FakePool`: starts in half a second and fails where a test wants it to.

`python -m tests.terrace.fakedaemon` is the process itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

from tests.system.daemon import Daemon, environment


class FakeDaemon(Daemon):
    """As `Daemon`, with its pools' directories at hand."""

    def spawn(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        assert self.process is None, "already started"
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*command(), "--home", str(self.home), "--config", str(self.configure()), *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment() | variables,
            )
        self.process = process
        return process

    def directory(self, pool: str) -> Path:
        return self.home / "pools" / pool

    def wait_log(self, text: str, timeout_s: float = 10.0) -> None:
        """Until the log says `text`."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self.log.read_text():
            assert time.monotonic() < deadline_s, f"the log never said {text!r}:\n{self.tail()}"
            time.sleep(0.02)


def command() -> list[str]:
    return [sys.executable, "-m", "tests.terrace.fakedaemon"]


if __name__ == "__main__":
    from terrace.daemon import main
    from tests.terrace.fakepool import FakePool

    sys.exit(main(engine=cast(Any, FakePool)))
