"""Block traces: what is read of them, and what is wrong with those that can't be."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace import trace as trace_module
from terrace.trace import Trace, read_trace
from tiers import TierError

SAMPLE = Path(__file__).with_name("traces") / "fio-zipf.iolog.gz"
"""fio --rw=randrw --rwmixread=70 --random_distribution=zipf:1.2 --norandommap --size=192m
--bssplit=4k/85:16k/10:64k/5 --number_ios=7000 --randseed=7 --write_iolog=..."""

VERSION_2 = """fio version 2 iolog
/dev/sda add
/dev/sda open
/dev/sda write 8192 4096
/dev/sda wait 1500000
/dev/sdb read 4095 2
/dev/sda trim 0 4096
/dev/sda sync 0 0
/dev/sda datasync 0 0
/dev/sdb read 0 65536
/dev/sda close
"""
VERSION_3 = """fio version 3 iolog
10 /dev/sda add
10 /dev/sda open
10 /dev/sda read 40960 4096
1260 /dev/sda write 0 1048576
2000 /dev/sda trim 0 4096
3000 /dev/sda close
"""
BLKPARSE = """  8,16   1        1     0.000000000   697  A  WS 1000 + 8 <- (8,17) 800
  8,16   1        2     0.000000100   697  Q  WS 1000 + 8 [jbd2/sdb1-8]
  8,16   1        3     0.000100000   697  G  WS 1000 + 8 [jbd2/sdb1-8]
  8,16   0        4     0.500000000     0  D  WS 1000 + 8 [swapper]
  8,32   0        5     1.250000000   700  Q   R 2056 + 16 [fio]
  8,16   0        6     1.300000000   700  Q   D 0 + 8 [fstrim]
  8,16   0        7     1.400000000   700  Q FWS [fsync]
  8,16   0        8     2.000000000     0  C  WS 1000 + 8 [0]
  8,16   0        9     2.100000000     0  m   N cfq workload slice:100
CPU0 (8,16):
 Reads Queued:           1,        8KiB  Writes Queued:           1,        4KiB
Total (8,16):
"""


def parsed(tmp_path: Path, text: str | bytes) -> Trace:
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_trace(path)


def rows(found: Trace) -> list[tuple[float, bool, int, int, int]]:
    columns = (found.times, found.writes, found.volumes, found.starts, found.counts)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_an_iolog_of_version_2_is_read(tmp_path: Path) -> None:
    found = parsed(tmp_path, VERSION_2)
    assert rows(found) == [(0, True, 1, 2, 1), (1.5, False, 2, 0, 2), (1.5, False, 2, 0, 16)]
    assert (found.format, found.names, found.skipped) == ("fio iolog version 2", ("/dev/sda", "/dev/sdb"), 3)


def test_an_iolog_of_version_3_is_read_and_has_times(tmp_path: Path) -> None:
    found = parsed(tmp_path, VERSION_3)
    assert rows(found) == [(0, False, 1, 10, 1), (1.25, True, 1, 0, 256)]
    assert (found.format, found.skipped) == ("fio iolog version 3", 1)


def test_what_fio_wrote_behind_an_older_log_goes_on_where_that_ended(tmp_path: Path) -> None:
    assert rows(parsed(tmp_path, VERSION_3 + VERSION_3))[2:] == [(3, False, 1, 10, 1), (4.25, True, 1, 0, 256)]
    with pytest.raises(TierError, match="line 8: has 'fio version 2 iolog', behind a log of another version"):
        parsed(tmp_path, VERSION_3 + VERSION_2)


@pytest.mark.parametrize("action", ["Q", "D", "C"])
def test_each_request_of_blkparse_s_text_counts_once(tmp_path: Path, action: str) -> None:
    lines = [line for line in BLKPARSE.splitlines(keepends=True) if f"  {action} " in line or line[0] != " "]
    found = parsed(tmp_path, BLKPARSE if action == "Q" else "".join(lines))
    assert rows(found)[0][1:] == (True, 1, 125, 1)
    assert len(found) == (2 if action == "Q" else 1)
    if action == "Q":
        assert rows(found)[1][1:] == (False, 2, 257, 2)
        assert rows(found)[1][0] == pytest.approx(1.2499999)
        assert (found.format, found.names, found.skipped) == ("blkparse", ("8,16", "8,32"), 2)


def test_a_trace_that_fio_made_is_read_compressed() -> None:
    found = read_trace(SAMPLE)
    assert len(found) == 7000 and found.format == "fio iolog version 3"
    assert 0.6 < 1 - float(found.writes.mean()) < 0.8
    assert set(found.counts.tolist()) == {1, 4, 16}
    assert int((found.starts + found.counts).max()) <= (192 << 20) // 4096
    assert (np.diff(found.times) >= 0).all()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1: '' begins no trace: give an iolog of fio"),
        ("hello\n", "line 1: 'hello' begins no trace"),
        ("fio version 1 iolog\n", "line 1: has 'fio version 1 iolog': versions 2 and 3 can be read"),
        ("fio version 2 iolog\n\n", "holds no read and no write"),
        ("fio version 2 iolog\n/dev/sda trim 0 4096\n", "holds no read and no write"),
        ("fio version 2 iolog\n/dev/sda read 0\n", "line 2: '/dev/sda read 0' can't be read as FILE ACTION"),
        ("fio version 2 iolog\n/dev/sda read x 4096\n", "line 2: '/dev/sda read x 4096' can't be read as"),
        ("fio version 2 iolog\n\n/dev/sda fly 0 4096\n", "line 3: 'fly' is no action of an iolog"),
        ("fio version 2 iolog\n/dev/sda wait\n", "line 2: '/dev/sda wait' can't be read as"),
        ("fio version 2 iolog\n/dev/sda\n", "line 2: '/dev/sda' can't be read as"),
        ("fio version 3 iolog\n/dev/sda read 0 4096\n", "line 2: '/dev/sda read 0 4096' can't be read as"),
        ("fio version 2 iolog\n/dev/sda read 0 0\n", "line 2: a request of 0 bytes can't be"),
        ("fio version 2 iolog\n/dev/sda read 0 -1\n", "line 2: a request of -1 bytes can't be"),
        ("fio version 2 iolog\n/dev/sda read -4096 4096\n", "line 2: offset -4096 is beyond"),
        ("fio version 2 iolog\n/dev/sda read 1125899906842624 1\n", "line 2: offset 1125899906842624 is beyond"),
        ("fio version 2 iolog\n/dev/sda read " + "9" * 4300 + " 1\n", "line 2: is longer than 4096 bytes"),
        (BLKPARSE.replace("2056 + 16", "x + 16"), "line 5: .* can't be read as SECTOR"),
        (BLKPARSE.replace("  8,32   0        5", "what"), "line 5: .* is no line of blkparse"),
        (b"\x1f\x8b\x08\x00garbage", "gzip compression is damaged"),
        (gzip.compress(VERSION_2.encode())[:-12], "gzip compression is damaged"),
        (b"\x00" * 5000, "line 1: is longer than 4096 bytes"),
        (b"\xff\xfe\n", "line 1: .* begins no trace"),
    ],
)
def test_what_is_wrong_is_said_by_file_and_line(tmp_path: Path, text: str | bytes, why: str) -> None:
    with pytest.raises(TierError, match=why) as error:
        parsed(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "trace")) and "\n" not in str(error.value)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TierError, match=r"none can't be read: No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(TierError, match="can't be read: Is a directory"):
        read_trace(tmp_path)


def test_too_many_requests_are_refused_before_memory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_REQUESTS", 2)
    with pytest.raises(TierError, match="line 10: there are more than 2 requests: give a part of the trace"):
        parsed(tmp_path, VERSION_2)


@settings(max_examples=300)
@given(st.data())
def test_garbage_is_refused_with_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = bytearray(data.draw(st.sampled_from([VERSION_2, VERSION_3, BLKPARSE])).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(text)
    with contextlib.suppress(TierError):
        found = read_trace(path)
        assert len(found) and (found.counts > 0).all() and (found.starts >= 0).all()
