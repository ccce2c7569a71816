"""All fuzz targets by name."""

from __future__ import annotations

from tests.fuzz.backup import BACKUP
from tests.fuzz.engine import Target
from tests.fuzz.formats import FORMATS
from tests.fuzz.image import IMAGE
from tests.fuzz.protocol import PROTOCOL

TARGETS: dict[str, Target] = {target.name: target for target in [*FORMATS, *PROTOCOL, *IMAGE, *BACKUP]}
