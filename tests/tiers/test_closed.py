"""Looking into a closed pool: what it says is so, it says nothing where it can't know, and it changes nothing."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from tests.tiers.helpers import QUIET, make_pool, run
from tiers import Pool, TierError
from tiers.closed import ClosedPool, look_into_closed
from tiers.layout import MIB


def digests(directory: Path) -> dict[Path, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_names_in_a_pool_that_was_closed_are_those_it_opens_with_and_nothing_changes(tmp_path: Path) -> None:
    async def body() -> Path:
        home = await make_pool(tmp_path)
        async with Pool.open(home) as pool:
            for name in ("a", "b", "gone"):
                await pool.create_volume(name, 4 * MIB)
            await pool.volume("a").write(0, b"x" * 8192)
            await pool.take_snapshots([("a", "s"), ("b", "t")])
            await pool.delete_volume("gone")
            await pool.rollback("a", "s", keep_as="before")
        return home

    home = run(body)
    before = digests(tmp_path)
    assert look_into_closed(home) == ClosedPool("p", {"a", "b", "a@s", "a@before", "b@t"})
    assert digests(tmp_path) == before


def test_of_a_pool_that_was_just_made_there_is_nothing_to_tell(tmp_path: Path) -> None:
    async def body() -> Path:
        return await make_pool(tmp_path)

    assert look_into_closed(run(body)) == ClosedPool("p", set())


def test_what_only_the_log_knows_leaves_the_question_open(tmp_path: Path) -> None:
    async def body() -> Path:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            await pool.create_volume("late", 4 * MIB)
            # As after a kill: what is on the disk now, with the locks gone.
            copy = tmp_path / "copy"
            copy.mkdir()
            for path in home.iterdir():
                (copy / path.name).write_bytes(path.read_bytes())
        return copy

    assert look_into_closed(run(body)) is None


def test_a_pool_that_is_open_is_refused_and_one_that_isnt_there_too(tmp_path: Path) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home):
            with pytest.raises(TierError, match="is open in another process") as busy:
                look_into_closed(home)
            assert busy.value.errno == errno.EBUSY

    run(body)
    with pytest.raises(TierError, match="there is no pool in") as missing:
        look_into_closed(tmp_path / "nowhere")
    assert missing.value.errno == errno.ENOENT


def test_a_device_that_is_missing_leaves_the_question_open(tmp_path: Path) -> None:
    async def body() -> Path:
        home = await make_pool(tmp_path)
        async with Pool.open(home) as pool:
            await pool.create_volume("v", 4 * MIB)
        return home

    home = run(body)
    (tmp_path / "fast.img").unlink()
    assert look_into_closed(home) is None
