"""`terrace backup` and `terrace restore` as people and scripts see them, on volumes in memory."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from terrace.cli import backup as backup_command
from terrace.cli import restore as restore_command
from terrace.cli.context import Context
from terrace.cli.root import root
from tests.system.daemon import environment
from tests.terrace.fakevolume import BLOCK, FakeOrigin, FakeVolume, stream_of


class Cli:
    """The command line over one live volume, `demo/vol`, and targets that are kept by name."""

    def __init__(self) -> None:
        self.origin = FakeOrigin(bytearray(random.Random(1).randbytes(8 * BLOCK)))
        self.targets: dict[str, FakeVolume] = {}

    def run(self, *arguments: str, stdin: bytes = b"") -> Result:
        result = CliRunner().invoke(root, arguments, input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    def ok(self, *arguments: str, stdin: bytes = b"") -> str:
        result = self.run(*arguments, stdin=stdin)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "-o", "json"))

    def error(self, *arguments: str, status: int = 1, stdin: bytes = b"") -> str:
        """The one line that it says on standard error."""
        result = self.run(*arguments, stdin=stdin)
        assert result.exit_code == status, result.output
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    def change(self, block: int) -> None:
        self.origin.image[block * BLOCK : (block + 1) * BLOCK] = random.Random(block).randbytes(BLOCK)

    def take(self, name: str) -> None:
        trio.run(self.origin.take, name)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    made = Cli()
    monkeypatch.setattr(Context, "connect", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(backup_command, "_origin", lambda client, pool, volume: made.origin)
    monkeypatch.setattr(
        restore_command, "_target", lambda client, pool, volume, policy: made.targets.setdefault(volume, FakeVolume())
    )
    monkeypatch.chdir(tmp_path)
    yield made


def test_a_full_backup_and_an_increment_are_made_verified_and_restored(cli: Cli) -> None:
    cli.take("monday")
    cli.change(3)
    cli.take("tuesday")
    assert cli.ok("backup", "demo/vol@monday", "full.tbk").startswith(
        "Backup of demo/vol@monday (full): 32 KiB of data, 3"
    )
    assert "(since monday): 4 KiB of data" in cli.ok("backup", "demo/vol@tuesday", "--since", "monday", "inc.tbk")
    shown = cli.ok("backup", "verify", "inc.tbk")
    for expected in (
        "demo/vol (id pool:v)",
        "tuesday, 2023-11-15",
        "monday, 2023-11-14",
        "32 KiB (32768 bytes)",
        "4 KiB",
    ):
        assert expected in shown
    assert shown.endswith("inc.tbk is sound.\n")
    assert cli.ok("restore", "demo/new", "full.tbk", "inc.tbk") == (
        "Volume demo/new is restored: it holds demo/vol@tuesday.\n"
    )
    assert cli.targets["new"].image == cli.origin.image
    assert "another full backup" in cli.error("restore", "demo/other", "full.tbk", "full.tbk")
    assert "new and empty; apply monday first" in cli.error("restore", "demo/other", "inc.tbk")
    assert not cli.targets["other"].exists


def test_a_restored_volume_is_brought_further_later(cli: Cli) -> None:
    for number, name in enumerate(("a", "b", "c")):
        cli.change(number)
        cli.take(name)
    cli.ok("backup", "demo/vol@a", "a.tbk")
    cli.ok("backup", "demo/vol@b", "b.tbk", "--since", "a")
    cli.ok("backup", "demo/vol@c", "c.tbk", "--since", "b")
    cli.ok("restore", "demo/new", "a.tbk")
    message = cli.error("restore", "demo/new", "c.tbk")
    assert "c.tbk is an increment based on snapshot b (id pool:2" in message and "demo/new is at a" in message
    cli.ok("restore", "demo/new", "b.tbk")
    found = cli.json("restore", "demo/new", "c.tbk")
    assert found == {"restored": "demo/new", "snapshot": "demo/vol@c", "files": ["c.tbk"]}
    assert cli.targets["new"].image == cli.origin.image


def test_a_directory_keeps_a_chain_that_is_listed_verified_and_restored(cli: Cli) -> None:
    assert "It is a full one: there is none of this volume yet." in cli.ok("backup", "demo/vol", "--to", "d")
    for block in (1, 2):
        cli.change(block)
        assert "(since backup-" in cli.ok("backup", "make", "--to", "d", "demo/vol")
    listed = cli.ok("backup", "list", "d")
    assert listed.count("demo/vol") == 3 and "full" in listed and ".inc.tbk" in listed
    rows = cli.json("backup", "list", "d")["backups"]
    assert [row["kind"] for row in rows] == ["full", "incremental", "incremental"]
    assert [len(row["needs"]) for row in rows] == [1, 2, 3]
    assert cli.ok("backup", "verify", "d") == "d: 3 of 3 backups can be restored, in 1 chain.\n"
    cli.ok("restore", "demo/new", "d")
    assert cli.targets["new"].image == cli.origin.image
    middle = rows[1]["snapshot"]["name"]
    assert middle in cli.ok("restore", "demo/older", "d", "--at", middle)
    assert cli.targets["older"].image != cli.origin.image
    cli.ok("restore", "demo/older", "d")
    assert cli.targets["older"].image == cli.origin.image
    assert "already" in cli.ok("restore", "demo/older", "d")
    cli.change(5)
    made = cli.json("backup", "demo/vol", "--to", "d", "--keep", "1", "--full")
    assert made["kind"] == "full" and len(made["removed"]) == 3
    assert len(list(Path("d").iterdir())) == 1


def test_a_directory_with_damage_and_gaps_is_told_of(cli: Cli) -> None:
    for block in (1, 2, 3):
        cli.change(block)
        cli.ok("backup", "demo/vol", "--to", "d")
    _, second, third = sorted(Path("d").iterdir(), key=lambda path: cli.json("backup", "verify", str(path))["begun_at"])
    damaged = bytearray(second.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    second.write_bytes(damaged)
    result = cli.run("backup", "verify", "d")
    assert result.exit_code == 1 and "1 of 3 backups can be restored" in result.stdout
    problem, gap, _ = result.stdout.splitlines()
    assert f"{second} is damaged at byte" in problem and f"{third.name} needs a backup of vol@backup-" in gap
    found = json.loads(cli.run("backup", "verify", "d", "-o", "json").stdout)
    assert found["ok"] is False and len(found["problems"]) == 2
    message = cli.error("restore", "demo/new", "d")
    assert "damaged" in message and "demo/new is incomplete now" in message
    second.unlink()
    result = cli.run("backup", "list", "d")
    assert result.exit_code == 0 and f"{third.name} needs a backup" in result.stdout
    assert "needs a backup of vol@backup-" in cli.error("restore", "demo/other", "d")
    # The chain can't go on over a gap.
    assert "It is a full one: vol-" in cli.ok("backup", "demo/vol", "--to", "d")


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("backup", "demo/vol@monday"), 2, "say where to"),
        (("backup", "demo/vol@monday", "f", "--to", "d"), 2, "say where to"),
        (("backup", "demo/vol", "f"), 2, "name a snapshot of demo/vol"),
        (("backup", "demo/vol@", "f"), 2, "write demo/vol@SNAP"),
        (("backup", "demo/vol@a@b", "f"), 2, "POOL/VOL@SNAP"),
        (("backup", "make", "demo", "f"), 2, "POOL/VOL"),
        (("backup", "demo/vol@monday", "f", "--keep", "2"), 2, "go with --to"),
        (("backup", "demo/vol", "--to", "d", "--since", "a"), 2, "--since goes with a FILE"),
        (("backup", "demo/vol", "--to", "d", "--keep", "0"), 2, "0"),
        (("backup", "demo/vol@monday", "-", "-o", "json"), 2, "not for JSON"),
        (("backup", "demo/vol@monday", "f", "--level", "20"), 2, "20"),
        (("backup", "demo/vol@none", "f"), 1, "has no snapshot none (it has monday, tuesday)"),
        (("backup", "demo/vol@tuesday", "f", "--since", "x"), 1, "has no snapshot x"),
        (("backup", "demo/vol@monday", "f", "--since", "tuesday"), 1, "tuesday is no older than monday"),
        (("backup", "demo/vol@monday", "there"), 1, "there exists"),
        (("backup", "demo/vol@monday", "directory"), 1, "--to directory"),
        (("backup", "demo/vol@monday", "no/such/f"), 1, "no/such/f can't be written"),
        (("backup", "demo/vol@monday", "/dev/full"), 1, "No space left"),
        (("backup", "list", "none"), 1, "none can't be read"),
        (("backup", "verify", "none"), 1, "none can't be read"),
        (("backup", "verify", "there"), 1, "there is not a backup"),
        (("backup", "nonsense"), 2, "nonsense"),
        (("restore", "demo/new"), 2, "Missing argument"),
        (("restore", "demo/new", "there", "--at", "x"), 2, "--at"),
        (("restore", "demo/new", "-", "there"), 2, "a call of its own"),
        (("restore", "demo/new", "there"), 1, "there is not a backup"),
        (("restore", "demo/new", "directory"), 1, "has no whole backup"),
        (("restore", "demo/new@snap", "there"), 2, "a volume is needed here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_wrong_is_one_line_and_leaves_no_file(
    cli: Cli, arguments: tuple[str, ...], status: int, word: str
) -> None:
    cli.take("monday")
    cli.take("tuesday")
    Path("there").write_text("something else")
    Path("directory").mkdir()
    assert word in cli.error(*arguments, status=status)
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name != "d") == ["directory", "there"]


def test_bad_streams_are_told_apart_with_their_byte(cli: Cli) -> None:
    stream = stream_of(random.Random(2).randbytes(4 * BLOCK))
    flipped = bytearray(stream)
    flipped[300] ^= 1
    for name, raw, expected in (
        ("cut", stream[:5000], "cut is cut short at byte 5000"),
        ("flip", bytes(flipped), "flip is damaged at byte"),
        ("tail", stream + b"x", f"tail has something behind its end, from byte {len(stream)}"),
        ("empty", b"", "empty is empty"),
    ):
        Path(name).write_bytes(raw)
        assert expected in cli.error("backup", "verify", name)
        assert expected.replace(name, "standard input", 1) in cli.error("backup", "verify", "-", stdin=raw)


def test_a_backup_goes_through_pipes(cli: Cli) -> None:
    stream = stream_of(bytes(cli.origin.image))
    assert "standard input is sound" in cli.ok("backup", "verify", "-", stdin=stream)
    assert "is restored" in cli.ok("restore", "demo/new", "-", stdin=stream)
    assert cli.targets["new"].image == cli.origin.image


PROGRAM = """
import contextlib, sys, trio
from terrace.cli import backup
from terrace.cli.context import Context
from terrace.cli.root import root
from tests.terrace.fakevolume import FakeOrigin
origin = FakeOrigin(bytearray(b"some text " * 409600))
trio.run(origin.take, "s")
Context.connect = lambda self: contextlib.nullcontext()
backup._origin = lambda *arguments: origin
root(["backup", "demo/vol@s", "-"])
"""


def test_standard_output_is_the_backup_alone_and_never_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    piped = subprocess.run(command, capture_output=True, env=environment(), check=True)
    assert piped.stderr.startswith(b"Backup of demo/vol@s (full): 3.91 MiB of data, ") and piped.stderr.endswith(
        b" on standard output.\n"
    )
    path = tmp_path / "piped"
    path.write_bytes(piped.stdout)
    assert CliRunner().invoke(root, ["backup", "verify", str(path)]).exit_code == 0
    master, terminal = pty.openpty()
    refused = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, env=environment(), check=False)
    os.close(terminal)
    os.close(master)
    assert refused.returncode == 2 and b"standard output is a terminal" in refused.stderr
    with Path("/dev/full").open("wb") as full:
        failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(b"Error: standard output can't be written at byte 0: No space left on device")


STOPPED = """
import contextlib, sys
from terrace.cli import restore
from terrace.cli.context import Context
from terrace.cli.root import root
from tests.terrace.fakevolume import FakeVolume
class Telling(FakeVolume):
    async def write(self, offset, data):
        await super().write(offset, data)
        print("writing", flush=True)
Context.connect = lambda self: contextlib.nullcontext()
restore._target = lambda *arguments: Telling()
root(["restore", "demo/new", "-"])
"""


def test_a_restore_that_is_stopped_while_its_pipe_is_silent_says_that_the_volume_is_incomplete() -> None:
    stream = stream_of(random.Random(1).randbytes(4 << 20))
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(stream[: 2 << 20])
        process.stdin.flush()
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGINT)
        # Its input stays open: the read that waits there is left behind.
        assert process.wait(20) == 1
        assert process.stderr is not None
        assert process.stderr.read() == (
            b"Error: stopped; demo/new is incomplete now, with only a part of demo/vol@s1: don't use it, delete it and "
            b"restore again\n"
        )
