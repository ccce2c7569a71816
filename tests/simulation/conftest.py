"""What the tests with simulated machines share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _logged_as_text() -> Iterator[None]:
    """pytest keeps what is logged until a test ends, and with an error in it the frames that it came through.

    In these are machines with all their devices: a minute of fresh seeds would hold gigabytes.
    """
    made_by = logging.getLogRecordFactory()

    def text(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = made_by(*arguments, **options)
        record.msg, record.args = record.getMessage(), None
        return record

    logging.setLogRecordFactory(text)
    yield
    logging.setLogRecordFactory(made_by)
