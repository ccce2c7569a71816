"""What passes SQLite, or a checksum, is not believed yet: values that can't be are refused with a sentence."""

import contextlib
import errno
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiers.helpers import QUIET, make_pool, open_refusal, refusal, run
from tiers import Pool
from tiers.engine import Engine
from tiers.layout import MAX_SEGMENT_ID, MIB
from tiers.record import Op


def edited(home: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(home / "catalog.sqlite")) as db, db:
        db.executescript(script)


async def pool_with_a_volume(directory: Path) -> Path:
    home = await make_pool(directory)
    async with Pool.open(home, settings=QUIET) as pool:
        await pool.create_volume("v", MIB)
    return home


ENDLESS = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT i AS key, i AS value FROM n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("UPDATE meta SET value = 'x' WHERE key = 'incarnation'", "incarnation is 'x'"),
        ("UPDATE meta SET value = -1 WHERE key = 'checkpoint_seq'", "checkpoint_seq is -1"),
        ("UPDATE meta SET value = 1 << 62 WHERE key = 'checkpoint_seq'", "checkpoint_seq is 4611686018427387904"),
        ("UPDATE meta SET value = 'a/b' WHERE key = 'pool_name'", "can't name a pool"),
        ("UPDATE meta SET value = X'00' WHERE key = 'pool_uuid'", "the uuid of the pool"),
        ("DELETE FROM meta WHERE key = 'log_slot'", "'log_slot' is not in it"),
        ("DELETE FROM devices", "names no device"),
        ("UPDATE devices SET path = 'a' || char(0)", "the path"),
        ("UPDATE devices SET tier = 'slow'", "the tier 'slow' is unknown"),
        ("UPDATE devices SET segment_bytes = 0", "segment_bytes is 0"),
        ("UPDATE devices SET idx = 999", "a device's index is 999"),
        ("UPDATE volumes SET size_bytes = 4097", "can't have 4097 bytes"),
        ("UPDATE volumes SET name = 'a b'", "can't name a volume"),
        ("UPDATE volumes SET mapped_blocks = 'many'", "mapped_blocks is 'many'"),
        ("UPDATE volumes SET created_at = 1e300", "created_at"),
        ("UPDATE volumes SET filling = 2", "filling is 2"),
        ("UPDATE segments SET kind = 9", "kind is 9"),
        ("UPDATE segments SET device = 7", "lies on device 7"),
        ("UPDATE segments SET idx = 100000", "idx is 100000"),
        ("UPDATE segments SET live = -1", "live is -1"),
        ("INSERT INTO dead VALUES (77, 1, 9, 1)", "the level of a dead subtree is 9"),
        ("ALTER TABLE volumes ADD COLUMN more", "not those of this format version"),
        ("CREATE TRIGGER t AFTER INSERT ON meta BEGIN DELETE FROM volumes; END", "not those of this format"),
        (f"DROP TABLE meta; CREATE VIEW meta AS {ENDLESS}", "no table of its state"),
        ("DROP TABLE dead", "not those of this format version"),
    ],
)
def test_a_catalog_with_a_value_that_cannot_be_is_refused_by_name(tmp_path: Path, script: str, reason: str) -> None:
    async def body() -> None:
        home = await pool_with_a_volume(tmp_path)
        edited(home, script)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert reason in str(error) and "--rebuild-catalog" in str(error)

    run(body)


def test_a_damaged_schema_whose_error_is_no_text_is_refused_too(tmp_path: Path) -> None:
    async def body() -> None:
        home = await pool_with_a_volume(tmp_path)
        path = home / "catalog.sqlite"
        data = bytearray(path.read_bytes())
        at = data.index(b"CREATE TABLE segments")
        data[at : at + 12] = b"\xff" * 12
        path.write_bytes(data)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "--rebuild-catalog" in str(error)

    run(body)


@pytest.mark.parametrize("change", ["size_bytes = size_bytes - 4096", "tier = 'base'"])
def test_a_label_and_a_catalog_that_disagree_are_both_named(tmp_path: Path, change: str) -> None:
    async def body() -> None:
        home = await pool_with_a_volume(tmp_path)
        edited(home, f"UPDATE devices SET {change}")
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert "its label says" in str(error) and "restore it" in str(error)

    run(body)


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda engine: engine.append_record(Op.CREATE, 1, MIB, 1, [ord("w")]), "a second time"),
        (lambda engine: engine.append_record(Op.CREATE, 50, MIB, 1, [ord("v")]), "a second time"),
        (lambda engine: engine.append_record(Op.LINK, 900, 100_000), "names place 100000"),
        (lambda engine: engine.append_record(Op.LINK, 900, 7 << 32), "no device 7"),
    ],
    ids=["an id twice", "a name twice", "a place that is not there", "a device that is not there"],
)
def test_a_log_that_tells_what_cannot_be_is_refused(
    tmp_path: Path, forge: Callable[[Engine], None], reason: str
) -> None:
    async def body() -> None:
        home = await pool_with_a_volume(tmp_path)
        device = tmp_path / "fast.img"
        async with Pool.open(home, settings=QUIET) as pool:
            forge(pool._engine)
            await pool._engine.flusher.flush()
            shutil.copytree(home, tmp_path / "home-then")
            shutil.copy(device, tmp_path / "device-then")
        shutil.rmtree(home)
        shutil.copytree(tmp_path / "home-then", home)
        shutil.copy(tmp_path / "device-then", device)
        error = await open_refusal(home)
        assert error.errno == errno.EIO
        assert reason in str(error)

    run(body)


def test_a_pool_whose_segment_ids_are_used_up_says_so(tmp_path: Path) -> None:
    async def body() -> None:
        home = await pool_with_a_volume(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            pool._engine.segments.next_id = MAX_SEGMENT_ID + 1

            async def roll() -> None:
                pool._engine.log.roll()

            error = await refusal(roll)
            assert "segment ids are used up" in str(error) and "nbdcopy" in str(error)

    run(body)
