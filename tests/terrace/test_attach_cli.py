"""Bad input to `terrace attach` and `detach`: one line that names it, and nothing attached."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.terrace.fakedaemon import FakeDaemon
from tests.terrace.test_cli import Cli


@pytest.fixture
def cli(daemon: FakeDaemon) -> Cli:
    return Cli(daemon.home)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["attach"], 2, "what shall be attached? Name a volume or snapshot, or say --list"),
        (["attach", "p"], 2, "doesn't name a volume; write POOL/VOL"),
        (["attach", "p/v@"], 2, "write p/v@SNAP"),
        (["attach", "p/v", "--force"], 2, "--force is for --mkfs"),
        (["attach", "p/v", "--read-only", "--mkfs", "xfs"], 2, "no filesystem can be made on what is read-only"),
        (["attach", "p/v@s", "--mkfs", "ext4"], 2, "no filesystem can be made on what is read-only"),
        (["attach", "p/v", "--list"], 2, "attaches nothing"),
        (["attach", "p/v", "--dead-timeout", "never"], 2, "is not possible"),
        (["attach", "p/v", "--dead-timeout", "soon"], 2, "is not an interval"),
        (["attach", "p/v", "--connections", "17"], 2, "1<=x<=16"),
        (["attach", "p/none"], 1, "has no volume 'none'"),
        (["attach", "p/.."], 1, "'..' is no name"),
        (["detach", "/dev/null"], 1, "no device that terrace attached: terrace attach --list"),
        (["detach", "p"], 2, "doesn't name a volume"),
        (["detach", "p/none"], 1, "p/none is not attached: terrace attach --list"),
        (["detach", "p/../.."], 2, "doesn't name a volume"),
    ],
)
def test_bad_input_is_one_line_that_names_it(cli: Cli, arguments: list[str], status: int, said: str) -> None:
    assert said in cli.error(*arguments, status=status)
    assert cli.json("attach", "--list") == []


def test_without_a_daemon_nothing_is_attached(tmp_path: Path) -> None:
    absent = Cli(tmp_path / "home")
    assert "no terraced runs" in absent.error("attach", "p/v", "--driver", "fuse")
    assert absent.json("attach", "--list") == []


def test_a_record_that_makes_no_sense_is_named_and_not_acted_on(cli: Cli) -> None:
    directory = cli.home / "run" / "attach"
    directory.mkdir(parents=True, exist_ok=True)
    wrong = directory / "p%2Fwrong.json"
    wrong.write_text("{")
    try:
        assert f"{wrong} is no record of an attachment" in cli.error("attach", "--list")
        assert str(wrong) in cli.error("detach", "p/wrong")
    finally:
        wrong.unlink()
