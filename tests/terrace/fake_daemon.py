"""`python -m tests.terrace.fake_daemon`: terraced over `FakePool`."""

import sys
from typing import Any, cast

from terrace.daemon import main
from tests.terrace.fakepool import FakePool

if __name__ == "__main__":
    sys.exit(main(engine=cast(Any, FakePool)))
