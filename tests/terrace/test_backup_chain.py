"""Directories of backups: what hangs on what, what comes next, what may go; and files that are whole or not there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.backup.chain import Backup, Catalogue, Gap, choose, decide, expired, file_name
from terrace.backup.directory import free_path, locked, read_backup, read_directory, remove, remove_leftovers
from terrace.backup.errors import BackupError
from terrace.backup.files import write_file
from terrace.backup.stream import Totals
from terrace.backup.write import Sink
from tests.terrace.fakevolume import BLOCK, header, snapshot, stream_of

WHOLE = Totals(0, 0, 0, 0, 0, 0, b"", b"")
DIRECTORY = Path("/backups")


def backup(number: int, base: int | None = None, *, volume: str = "v", begun: int = 0, whole: bool = True) -> Backup:
    """A backup of snapshot `number`; files of one snapshot are told apart by when they were begun."""
    found = replace(header(BLOCK, number, base, volume_id=volume), volume=volume, begun_us=begun or number)
    name = f"{volume}-{number}-{'full' if base is None else base}-{begun}"
    return Backup(DIRECTORY / name, found, WHOLE if whole else None, 1000)


@st.composite
def catalogues(draw: st.DrawFn) -> list[Backup]:
    """Anything that could lie in a directory: gaps, several backups of one snapshot, bases by any clock, circles."""
    found = {}
    for begun in range(1, draw(st.integers(1, 14))):
        number = draw(st.integers(1, 8))
        base = draw(st.none() | st.sampled_from([other for other in range(1, 9) if other != number]))
        one = backup(number, base, volume=draw(st.sampled_from("vvvw")), begun=begun, whole=draw(st.integers(0, 9)) > 0)
        found[one.path] = one
    return list(found.values())


def restorable(backups: list[Backup]) -> set[tuple[str, str]]:
    """Keys of all snapshots that can be restored by any way: the plain definition."""
    reached: set[tuple[str, str]] = set()
    while True:
        more = {
            one.key
            for one in backups
            if one.totals is not None
            and (one.header.base is None or (one.header.volume_id, one.header.base.id) in reached)
        }
        if more <= reached:
            return reached
        reached |= more


@given(catalogues())
def test_whatever_can_be_restored_has_a_path_and_everything_else_a_gap(backups: list[Backup]) -> None:
    catalogue = Catalogue(backups)
    reached = restorable(backups)
    for one in catalogue.whole:
        path = catalogue.path(one)
        if isinstance(path, Gap):
            assert one.header.base is not None
            assert (one.header.volume_id, one.header.base.id) not in reached
            continue
        assert path[-1] == one and path[0].header.base is None
        for before, after in itertools.pairwise(path):
            assert after.header.base is not None and before.header.snapshot.id == after.header.base.id
    assert {key for key in {one.key for one in backups} if catalogue.restorable(key)} == reached
    members = [one.path for chain in catalogue.chains() for one in chain]
    assert len(members) == len(set(members)) == len(catalogue.whole) - len(catalogue.gaps())


@settings(max_examples=300)
@given(catalogues(), st.integers(1, 3), st.data())
def test_retention_never_breaks_what_it_keeps(backups: list[Backup], keep: int, data: st.DataObject) -> None:
    catalogue = Catalogue(backups)
    gone = expired(catalogue, "v", keep)
    paths = {one.path for one in gone}
    assert all(one.header.volume_id == "v" and one.totals is not None for one in gone)
    kept_chains = [chain for chain in catalogue.of_volume("v").chains() if chain[0].path not in paths]
    assert len(kept_chains) == min(keep, len(catalogue.of_volume("v").chains()))
    # Also when a crash stops it anywhere: what is there can be restored, if it could before.
    done = data.draw(st.integers(0, len(gone)))
    left = [one for one in backups if one.path not in {one.path for one in gone[:done]}]
    after = Catalogue(left)
    for one in catalogue.whole:
        if one in left and not isinstance(catalogue.path(one), Gap):
            assert not isinstance(after.path(one), Gap)
    for chain in kept_chains:
        for one in chain:
            assert after.path(one) == catalogue.path(one)


def decided(backups: list[Backup], number: int, kept: set[int], increments: int = 3, *, full: bool = False) -> str:
    ids = {snapshot(one).id for one in kept}
    found = decide(Catalogue(backups), "v", snapshot(number), ids, increments, full=full)
    return found.base.path.name if found.base else found.why


def test_the_next_backup_is_an_increment_as_long_as_it_can_be() -> None:
    chain = [backup(1), backup(2, 1), backup(3, 2)]
    assert decided([], 1, {1}) == "there is none of this volume yet"
    assert decided([backup(1, volume="w")], 2, {1, 2}) == "there is none of this volume yet"
    assert decided(chain[:1], 2, {1, 2}) == chain[0].path.name
    assert decided(chain, 4, {3, 4}) == chain[2].path.name
    assert decided(chain, 4, {3, 4}, full=True) == "that was asked for"
    assert decided(chain, 4, {3, 4}, 2) == "the last one has 2 increments"
    assert decided(chain[:2], 4, {2, 4}, 0) == "the last one has 1 increment"
    assert decided(chain, 4, {3, 4}, 0) == "the last one has 2 increments"
    assert decided(chain, 4, {2, 4}) == "the volume has no snapshot s3 (the last one's) any more"
    assert "needs a backup of v@s2 (id pool:2, of 2023" in decided([chain[0], chain[2]], 4, {3, 4})
    assert decided([*chain, backup(4, 3, whole=False)], 5, {3, 4}) == chain[2].path.name
    assert decided(chain, 2, {1, 2, 3}) == chain[0].path.name
    assert decided(chain, 1, {1, 2, 3}) == "there is none of an older snapshot"


def chosen(backups: list[Backup], volume: str | None = None, at: str | None = None) -> list[str]:
    return [one.path.name for one in choose(Catalogue(backups), DIRECTORY, volume, at)]


def refused(backups: list[Backup], volume: str | None = None, at: str | None = None) -> str:
    with pytest.raises(BackupError) as caught:
        choose(Catalogue(backups), DIRECTORY, volume, at)
    return str(caught.value)


def test_the_newest_snapshot_is_restored_or_the_one_that_was_named() -> None:
    chain = [backup(1), backup(2, 1), backup(3, 2), backup(4)]
    names = [one.path.name for one in chain]
    assert chosen(chain) == names[3:]
    assert chosen(chain, at="s3") == names[:3]
    assert chosen(chain, at="pool:2", volume="demo/v") == names[:2]
    other = backup(9, volume="w")
    assert chosen([*chain, other], volume="w") == [other.path.name]
    assert "several volumes (demo/v, demo/w)" in refused([*chain, other])
    assert "no backup of snapshot s9" in refused(chain, at="s9")
    assert "no backup of x" in refused(chain, volume="x")
    assert "no whole backup" in refused([])
    assert "v-3-2-0 needs a backup of v@s2" in refused([chain[0], chain[2]])
    assert "v-5-4-0 has no end, so the newest" in refused([*chain, backup(5, 4, whole=False)])
    assert chosen([*chain, backup(5, 4, whole=False)], at="s4") == names[3:]
    twin = replace(chain[1].header, snapshot=replace(snapshot(7), name="s1"))
    assert "several snapshots called s1" in refused([*chain, replace(chain[1], header=twin)], at="s1")


def test_the_names_of_files_say_what_they_are() -> None:
    assert file_name("vol", snapshot(1), full=True) == "vol-20231114T231320Z-s1.full.tbk"
    assert file_name("vol", snapshot(2), full=False) == "vol-20231115T001320Z-s2.inc.tbk"
    strange = file_name("../../etc\u00e9", replace(snapshot(1), name="x" * 255), full=True)
    assert "/" not in strange and len(strange) < 200


# -- files -------------------------------------------------------------------------------------------------------------


def put(path: Path, data: bytes) -> None:
    async def write(sink: Sink) -> None:
        await sink.write(data[:10])
        await sink.write(data[10:])

    trio.run(write_file, path, write)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    async def fail(sink: Sink) -> None:
        await sink.write(bytes(3 << 20))
        assert [path.name for path in tmp_path.iterdir()] == [f".it.tbk.{os.getpid()}.part"]
        raise BackupError(5, "it broke")

    with pytest.raises(BackupError, match="it broke"):
        trio.run(write_file, tmp_path / "it.tbk", fail)
    assert list(tmp_path.iterdir()) == []
    put(tmp_path / "it.tbk", b"content of it")
    assert [path.name for path in tmp_path.iterdir()] == ["it.tbk"]
    assert (tmp_path / "it.tbk").read_bytes() == b"content of it"
    with pytest.raises(BackupError, match=r"it\.tbk exists; remove it"):
        put(tmp_path / "it.tbk", b"more")
    assert (tmp_path / "it.tbk").read_bytes() == b"content of it"


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="none/it can't be written: No such file"):
        put(tmp_path / "none" / "it", b"")
    with pytest.raises(BackupError, match="is a directory; --to"):
        put(tmp_path, b"")
    with pytest.raises(BackupError, match="/dev/full can't be written at byte 0: No space left on device; make room"):
        put(Path("/dev/full"), b"anything")
    master, terminal = os.openpty()
    with pytest.raises(BackupError, match="is a terminal"):
        put(Path(os.ttyname(terminal)), b"")
    os.close(master)
    os.close(terminal)


def test_a_fifo_is_written_as_it_is(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as cat:
        put(fifo, b"through a pipe")
        assert cat.communicate()[0] == b"through a pipe"


# -- directories -------------------------------------------------------------------------------------------------------


def test_a_directory_is_read_from_its_files_alone(tmp_path: Path) -> None:
    first, second = bytes(2 * BLOCK), b"x" * BLOCK + bytes(BLOCK)
    full, increment = stream_of(first, 1), stream_of(second, 2, (1, first))
    (tmp_path / "a.full.tbk").write_bytes(full)
    (tmp_path / "b.inc.tbk").write_bytes(increment)
    (tmp_path / ".c.inc.tbk.1.part").write_bytes(b"half")
    (tmp_path / "README").write_text("not a backup")
    found = read_directory(tmp_path)
    assert found.problems == []
    assert [one.path.name for one in found.catalogue.whole] == ["a.full.tbk", "b.inc.tbk"]
    assert [len(chain) for chain in found.catalogue.chains()] == [2]
    assert read_backup(tmp_path / "b.inc.tbk").totals is not None
    (tmp_path / "b.inc.tbk").write_bytes(increment[:-1])
    (tmp_path / "d.full.tbk").write_bytes(b"garbage")
    (tmp_path / "e.full.tbk").mkdir()
    found = read_directory(tmp_path)
    assert [one.path.name for one in found.catalogue.whole] == ["a.full.tbk"]
    garbage, directory, cut = found.problems
    assert "b.inc.tbk has no end: it is cut short" in cut
    assert "d.full.tbk is not a backup" in garbage
    assert "e.full.tbk can't be read" in directory
    with pytest.raises(BackupError, match="none can't be read"):
        read_directory(tmp_path / "none")


def test_one_backup_at_a_time_writes_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "backups"
    with locked(directory):
        code = "import pathlib, sys, terrace.backup.directory as d; d.locked(pathlib.Path(sys.argv[1])).__enter__()"
        other = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True)
        assert other.returncode == 1 and f"another backup to {directory} runs" in other.stderr
    with locked(directory):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(BackupError, match="file can't be used"), locked(tmp_path / "file"):
        pass


def test_leftovers_and_expired_files_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".v-1-s.full.tbk.77.part", ".other.part", "v.full.tbk", "w.full.tbk"):
        (tmp_path / name).write_bytes(stream_of(bytes(BLOCK)))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.part", "v.full.tbk", "w.full.tbk"]
    remove(tmp_path, [read_backup(tmp_path / "v.full.tbk")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.part", "w.full.tbk"]
    assert free_path(tmp_path, "w.full.tbk") == tmp_path / "w-2.full.tbk"
    assert free_path(tmp_path, "x.full.tbk") == tmp_path / "x.full.tbk"
