"""A record from a disk or a peer: understood, or refused with a sentence."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from replication.membership import decode, encode
from tests.replication.stores import first_record


def changed(path: list[Any], value: Any) -> bytes:
    plain = json.loads(encode(first_record("ab")))
    at = plain
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(plain).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["options", "timeout_s"], "5"),
        (["options", "lease_s"], 0),
        (["options", "lease_s"], float("nan")),
        (["options", "below_quorum"], "perhaps"),
        (["legs", 0, "id"], ["a"]),
        (["legs", 0, "kind"], "floppy"),
        (["term", "number"], "1"),
        (["history", 0, "term", "id"], {}),
        (["history", 0, "forced"], 1),
        (["history", 0, "epoch"], float("inf")),
        (["voters"], [1, 2]),
        (["primary"], 7),
        (["epoch"], 0.5),
        (["size_bytes"], None),
        (["size_bytes"], 0),
    ],
)
def test_a_record_with_a_value_of_another_kind_is_refused_with_a_sentence(path: list[Any], value: Any) -> None:
    with pytest.raises(OSError, match="can't be understood") as refused:
        decode(changed(path, value))
    assert refused.value.errno == errno.EPROTO


def test_a_record_that_is_nested_without_end_is_refused_with_a_sentence() -> None:
    with pytest.raises(OSError, match="nested too deep"):
        decode(b"[" * 100_000)
