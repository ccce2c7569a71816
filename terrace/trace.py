"""Block traces: what was read and written, in order. fio's iolog (versions 2 and 3) and blkparse's text.

fio writes an iolog with `write_iolog=FILE`; a line is an action on a file (`add`, `open`, `close`), or an I/O (file,
`read`/`write`/`trim`/`sync`/..., offset, length), or a `wait` in microseconds. Version 3 has a time in milliseconds
before each. blkparse prints, in its default format, device, CPU, sequence, seconds, process, action, RWBS, sector, +
and sectors; the actions Q (queued) are what counts, or D (issued), or C (completed), whichever comes first in this
order. Text that is compressed with gzip is read too.
"""

import errno
import gzip
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Final

import numpy as np

from tiers import TierError
from tiers.heat import Ints, Mask
from tiers.layout import BLOCK_BYTES, BLOCK_SHIFT

MAX_REQUESTS: Final = 50_000_000
"""More would take gigabytes of memory."""
MAX_LINE_BYTES: Final = 4096
MAX_LENGTH: Final = 1 << 30
MAX_OFFSET: Final = 1 << 50
"""A volume ends there at the latest."""
SECTOR_BYTES: Final = 512
_BLKTRACE = re.compile(rb"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d+\s+\d+\s+[A-Za-z]+\s")
_CHOICE = (b"Q", b"D", b"C")


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of the trace: arrays of one length. Starts and counts in blocks of 4 KiB."""

    times: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    """Seconds since the trace began."""
    writes: Mask
    volumes: Ints
    """Which file or device, from 1 on, in the order of their appearance."""
    starts: Ints
    counts: Ints
    format: str = "?"
    names: tuple[str, ...] = ()
    skipped: int = 0
    """Operations that move no data: trims, flushes."""

    VOLUME_SHIFT: ClassVar[int] = 40

    def __len__(self) -> int:
        return len(self.starts)

    def slice(self, first: int, end: int) -> "Trace":
        """A part of it, by request."""
        part = slice(first, end)
        return Trace(self.times[part], self.writes[part], self.volumes[part], self.starts[part], self.counts[part])

    def only(self, *, writes: bool) -> "Trace":
        """Its reads, or its writes."""
        chosen = self.writes == writes
        return Trace(
            self.times[chosen], self.writes[chosen], self.volumes[chosen], self.starts[chosen], self.counts[chosen]
        )


class _Collector:
    """Requests as they are parsed."""

    def __init__(self) -> None:
        self.times = array("d")
        self.writes = array("B")
        self.volumes = array("q")
        self.offsets = array("q")
        self.lengths = array("q")
        self.names: dict[bytes, int] = {}
        self.skipped = 0

    def volume(self, name: bytes) -> int:
        return self.names.setdefault(name, len(self.names) + 1)

    def add(self, time: float, is_write: bool, volume: int, offset: int, length: int) -> None:
        if not 0 < length <= MAX_LENGTH:
            raise ValueError(f"a request of {length} bytes can't be: from 1 byte to 1 GiB are possible")
        if not 0 <= offset <= MAX_OFFSET - length:
            raise ValueError(f"offset {offset} is beyond the end of any volume (1 PiB)")
        if len(self.offsets) >= MAX_REQUESTS:
            raise ValueError(f"there are more than {MAX_REQUESTS} requests: give a part of the trace")
        self.times.append(time)
        self.writes.append(is_write)
        self.volumes.append(volume)
        self.offsets.append(offset)
        self.lengths.append(length)

    def trace(self, form: str) -> Trace:
        offsets = np.frombuffer(self.offsets, np.int64) if self.offsets else np.empty(0, np.int64)
        lengths = np.frombuffer(self.lengths, np.int64) if self.lengths else np.empty(0, np.int64)
        starts = offsets >> BLOCK_SHIFT
        times = np.frombuffer(self.times, np.float64) if self.times else np.empty(0)
        return Trace(
            times - (times[0] if len(times) else 0),
            np.frombuffer(self.writes, np.uint8).astype(np.bool_) if self.writes else np.empty(0, np.bool_),
            np.frombuffer(self.volumes, np.int64) if self.volumes else np.empty(0, np.int64),
            starts,
            (offsets + lengths + BLOCK_BYTES - 1 >> BLOCK_SHIFT) - starts,
            form,
            tuple(name.decode(errors="replace") for name in self.names),
            self.skipped,
        )


def read_trace(path: Path, progress: Callable[[int], None] = lambda done: None) -> Trace:
    """Read a trace. `progress` is told how many bytes of the file are done.

    Raises TierError, naming file and line: ENOENT and the like if it can't be read, EINVAL for what is no trace.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _parse(path, _lines(path, file, packed, progress))
    except TierError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TierError(
            errno.EINVAL, f"{path}: its gzip compression is damaged ({error}): make the file anew"
        ) from None
    except OSError as error:
        raise TierError(error.errno or errno.EIO, f"{path} can't be read: {error.strerror or error}") from error


def _lines(path: Path, file: BinaryIO, packed: bool, progress: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """(number, line) of all lines that aren't empty."""
    text: BinaryIO = gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[assignment]
    number = 0
    while line := text.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _refused(path, number, f"is longer than {MAX_LINE_BYTES} bytes: this is no text of a trace")
        if number % 8192 == 0:
            progress(file.tell())
        if line.strip():
            yield number, line.strip()


def _refused(path: Path, number: int, why: str) -> TierError:
    return TierError(errno.EINVAL, f"{path}, line {number}: {why}")


def _parse(path: Path, lines: Iterator[tuple[int, bytes]]) -> Trace:
    number, first = next(lines, (1, b""))
    head = first.split()
    if head[:3] == [b"fio", b"version", b"2"]:
        collector, form = _iolog(path, lines, timed=False), "fio iolog version 2"
    elif head[:3] == [b"fio", b"version", b"3"]:
        collector, form = _iolog(path, lines, timed=True), "fio iolog version 3"
    elif head[:2] == [b"fio", b"version"]:
        raise _refused(path, number, f"has {_shown(first)}: versions 2 and 3 can be read; convert it with a newer fio")
    elif _BLKTRACE.match(first + b" "):
        collector, form = _blkparse(path, _again((number, first), lines)), "blkparse"
    else:
        raise _refused(
            path,
            number,
            f"{_shown(first)} begins no trace: give an iolog of fio (write_iolog=FILE), or what blkparse prints",
        )
    if not collector.offsets:
        raise TierError(errno.EINVAL, f"{path} holds no read and no write: there is nothing to simulate")
    return collector.trace(form)


def _again(first: tuple[int, bytes], rest: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield first
    yield from rest


def _shown(line: bytes) -> str:
    text = line[:60].decode(errors="replace")
    return repr(text + "..." if len(line) > 60 else text)


_FILE_ACTIONS = {b"add", b"open", b"close"}
_NO_DATA = {b"trim", b"sync", b"datasync", b"sync_file_range"}


def _iolog(path: Path, lines: Iterator[tuple[int, bytes]], *, timed: bool) -> _Collector:
    collector = _Collector()
    began = now = 0.0
    for number, line in lines:
        words = line.split()
        if words[:2] == [b"fio", b"version"]:
            if words[2:3] != ([b"3"] if timed else [b"2"]):
                raise _refused(path, number, f"has {_shown(line)}, behind a log of another version: give one of them")
            began = now  # fio writes behind what is in the file
            continue
        try:
            if timed:
                now = began + int(words[0]) / 1000
                words = words[1:]
            if len(words) == 2 and words[1] in _FILE_ACTIONS:
                continue
            name, action, *numbers = words
            if action == b"wait":
                now += int(numbers[0]) / 1e6
            elif action in _NO_DATA:
                collector.skipped += 1
            elif action in (b"read", b"write"):
                offset, length = map(int, numbers)
                collector.add(now, action == b"write", collector.volume(name), offset, length)
            else:
                raise ValueError(f"{_shown(action)} is no action of an iolog")
        except (ValueError, IndexError) as error:
            raise _refused(path, number, _reason(error, line, "FILE ACTION OFFSET LENGTH")) from None
    return collector


_SUMMARY = (b"CPU", b"Total", b"Throughput", b"Events", b"Skips", b"Input", b"Reads", b"IO unplugs")


def _blkparse(path: Path, lines: Iterator[tuple[int, bytes]]) -> _Collector:
    by_action = {action: _Collector() for action in _CHOICE}
    for number, line in lines:
        if not _BLKTRACE.match(line + b" "):
            if line.startswith(
                (b"CPU", b"Total", b"Throughput", b"Events", b"Skips", b"Input", b"Reads", b"IO unplugs")
            ):
                break  # the summary that blkparse prints at the end
            raise _refused(path, number, f"{_shown(line)} is no line of blkparse's default format")
        words = line.split()
        collector = by_action.get(words[5])
        if collector is None or len(words) < 7:
            continue
        flags = words[6]
        try:
            is_write = b"W" in flags
            if b"D" in flags or not (is_write or b"R" in flags) or b"+" not in words[7:9]:
                collector.skipped += 1  # a discard, a flush, or a command without data
                continue
            sector, plus, sectors, *_ = words[7:]
            if plus != b"+":
                raise ValueError("expected SECTOR + SECTORS")
            if int(sectors) == 0:
                collector.skipped += 1
                continue
            collector.add(
                float(words[3]),
                is_write,
                collector.volume(words[0]),
                int(sector) * SECTOR_BYTES,
                int(sectors) * SECTOR_BYTES,
            )
        except (ValueError, IndexError) as error:
            raise _refused(path, number, _reason(error, line, "SECTOR + SECTORS")) from None
    return next((by_action[action] for action in _CHOICE if by_action[action].offsets), by_action[b"Q"])


def _reason(error: Exception, line: bytes, form: str) -> str:
    said = str(error)
    if isinstance(error, IndexError) or "unpack" in said or "int()" in said or "literal" in said or "convert" in said:
        return f"{_shown(line)} can't be read as {form}"
    return said
