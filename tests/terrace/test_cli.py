"""The command line: what people and scripts see, on a daemon over fake pools."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from terrace.cli.output import duration, show_table, speed_text, wrapped
from terrace.cli.pool import _one_option_each
from terrace.cli.root import root
from terrace.home import Home
from tests.system.daemon import environment
from tests.terrace.fakedaemon import FakeDaemon
from tiers import DeviceSpec, Pool


class Cli:
    """`terrace` in this process, on one home."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str, stdin: str = "") -> Result:
        result = CliRunner().invoke(root, ["--home", str(self.home), *arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    def ok(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "-o", "json"))

    def error(self, *arguments: str, status: int = 1) -> str:
        """The one line that it says on standard error."""
        result = self.run(*arguments)
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr


@pytest.fixture
def cli(daemon: FakeDaemon) -> Cli:
    return Cli(daemon.home)


@pytest.fixture
def volume(cli: Cli) -> Iterator[str]:
    cli.ok("volume", "create", "p/v", "1M")
    yield "p/v"
    cli.ok("volume", "delete", "p/v", "--yes")


def test_a_pool_is_created_shown_grown_checked_and_deleted(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    os.truncate("there", 64 << 20)
    assert "3 device(s)" in cli.ok("pool", "create", "q", "--fast", "a=64M", "there", "--base", "sub=dir=1G")
    shown = cli.ok("pool", "show", "q")
    for expected in ("online", f"{tmp_path}/a", f"{tmp_path}/there", f"{tmp_path}/sub=dir", "1 GiB", "4 KiB"):
        assert expected in shown
    assert "4 device(s)" in cli.ok("pool", "grow", "q", "--base", "b=64M")
    assert "q" in cli.ok("pool", "list")
    assert "is sound" in cli.ok("pool", "check", "q", "--full")
    assert cli.json("pool", "check", "q")["ok"] is True  # type: ignore[index]
    assert cli.ok("pool", "open", "q") == "Pool q is online.\n"
    assert cli.json("pool", "delete", "q", "--yes") == {"deleted": "q"}
    assert "q" not in cli.ok("pool", "list")


def test_a_volume_is_created_shown_resized_and_deleted(cli: Cli, daemon: FakeDaemon) -> None:
    assert f"nbd://127.0.0.1:{daemon.port}/p/v" in cli.ok("volume", "create", "p/v", "1M")
    assert "p/v" in cli.ok("volume", "list")
    assert "p/v" in cli.ok("volume", "list", "p")
    shown = cli.ok("volume", "show", "p/v")
    assert "1 MiB (1048576 bytes)" in shown
    assert f"nbd+unix:///p/v?socket={daemon.home}/nbd.sock" in shown
    assert cli.ok("volume", "resize", "p/v", "2M") == "Volume p/v has 2 MiB.\n"
    assert "--shrink" in cli.error("volume", "resize", "p/v", "1M")
    assert cli.ok("volume", "resize", "p/v", "1M", "--shrink") == "Volume p/v has 1 MiB.\n"
    assert cli.ok("volume", "delete", "p/v", "--yes") == "Volume p/v is deleted.\n"
    assert "p/v" not in cli.ok("volume", "list")


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("pool", "list"),
        ("pool", "show", "p"),
        ("pool", "check", "p"),
        ("volume", "list"),
        ("volume", "show", "p/v"),
    ],
    ids=" ".join,
)
def test_every_noun_speaks_json(cli: Cli, volume: str, arguments: tuple[str, ...]) -> None:
    assert cli.json(*arguments)


def test_the_status_names_the_daemon_its_addresses_and_its_pools(cli: Cli, daemon: FakeDaemon) -> None:
    assert daemon.process is not None
    shown = cli.ok("status")
    for expected in (f"process {daemon.process.pid}", str(daemon.home), f"nbd://127.0.0.1:{daemon.port}/", "online"):
        assert expected in shown


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("pool", "show", "none"), 1, "there is no pool 'none'"),
        (("volume", "show", "p/none"), 1, "none"),
        (("volume", "show", "p"), 2, "write POOL/VOL"),
        (("volume", "show", "p/a/b"), 2, "write POOL/VOL"),
        (("volume", "create", "p/x", "0"), 1, "4096"),
        (("volume", "create", "p/x", "7"), 1, "4096"),
        (("volume", "create", "p/x", str(1 << 63)), 1, "1 PiB"),
        (("volume", "create", "p/x", "-1"), 2, "'-1' is negative"),
        (("volume", "create", "p/x", "-10G"), 2, "'-10G' is negative"),
        (("volume", "create", "p/x", "--", "-1"), 2, "'-1' is negative"),
        (("volume", "create", "p/x", "much"), 2, "'much' is not a size"),
        (("volume", "create", "p/x", "10GB"), 2, "write 10G"),
        (("volume", "create", "p/x"), 2, "SIZE"),
        (("volume", "create", "p/x\ny", "1M"), 1, "name"),
        (("volume", "create", "p/" + "x" * 300, "1M"), 1, "name"),
        (("volume", "create", "none/x", "1M"), 1, "none"),
        (("pool", "create", "q"), 2, "--fast or --base"),
        (("pool", "create", "q", "--fast", "d=10GB"), 2, "write 10G"),
        (("pool", "create", "q", "--fast", "/nonexistent/d"), 1, "/nonexistent/d"),
        (("pool", "create", "a/b", "--fast", "/nonexistent/d"), 1, "name"),
        (("pool", "create", "p", "--fast", "/nonexistent/d"), 1, "exists already"),
        (("pool", "delete", "p"), 2, "--yes"),
        (("pool", "show", "p", "-o", "xml"), 2, "xml"),
        (("poll",), 2, "poll"),
        (("pool", "show", "p", "--colour"), 2, "--colour"),
        (("pool", "show", "\x1b[31mred"), 1, "red"),
    ],
)
def test_an_error_is_one_line_that_names_the_thing(
    cli: Cli, arguments: tuple[str, ...], status: int, word: str
) -> None:
    line = cli.error(*arguments, status=status)
    assert word in line
    assert "\x1b" not in line


@pytest.mark.parametrize("arguments", [("status",), ("pool", "list"), ("volume", "create", "p/v", "1M")], ids=" ".join)
def test_without_a_daemon_one_line_says_so_and_how_to_start_it(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    line = Cli(tmp_path / "home").error(*arguments)
    assert f"terraced --home {tmp_path}/home" in line
    assert not (tmp_path / "home").exists()


def test_a_socket_that_a_killed_daemon_left_is_no_daemon(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    own_daemon.kill()
    assert "terraced --home" in Cli(own_daemon.home).error("status")


def test_without_a_daemon_a_check_opens_the_pool_itself(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")

    async def make() -> None:
        await Pool.create(home.pools / "p", "p", [DeviceSpec(tmp_path / "device", "fast", 64 << 20)])
        async with Pool.open(home.pools / "p") as pool:
            await (await pool.create_volume("v", 1 << 20)).write(0, b"x" * 4096)

    home.pools.mkdir(parents=True)
    trio.run(make)
    cli = Cli(home.path)
    assert cli.ok("pool", "check", "p", "--full").startswith("Pool p is sound: 1 volume(s), 1 blocks mapped, 4 KiB")
    assert cli.json("pool", "check", "p")["ok"] is True  # type: ignore[index]
    line = cli.error("pool", "check", "none")
    assert "no pool 'none'" in line
    assert "no terraced runs" in line
    with home.locked():
        assert "in use" in cli.error("pool", "check", "p")


def test_a_failed_pool_is_listed_with_its_reason_and_the_next_step(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    device = {"path": f"{own_daemon.home}/d", "tier": "fast", "size": "64M"}
    own_daemon.api("POST", "/v1/pools", {"name": "bad", "devices": [device]})
    own_daemon.kill()
    (own_daemon.directory("bad") / "fail-open").write_text("the device /x is gone")
    own_daemon.start()
    cli = Cli(own_daemon.home)
    assert "the device /x is gone" in cli.ok("pool", "list")
    shown = cli.ok("pool", "show", "bad")
    assert "the device /x is gone" in shown
    assert "terrace pool open bad" in shown
    assert "the device /x is gone" in cli.error("pool", "open", "bad")
    assert "the device /x is gone" in cli.error("volume", "create", "bad/v", "1M")
    assert cli.ok("volume", "list").startswith("There are no volumes")
    refused = cli.error("pool", "delete", "bad", "--yes")
    assert "the device /x is gone" in refused and "`terrace pool delete bad --force`" in refused
    asked = cli.run("pool", "delete", "bad", "--force")
    assert asked.exit_code == 2 and "what is in it isn't known" in asked.stderr and "--yes" in asked.stderr
    deleted = cli.run("pool", "delete", "bad", "--force", "--yes", "-o", "json")
    assert (deleted.exit_code, json.loads(deleted.stdout)) == (0, {"deleted": "bad", "legs": None})
    assert cli.ok("pool", "list").startswith("There are no pools")


def test_a_damaged_log_is_given_up_only_when_that_is_said(own_daemon: FakeDaemon) -> None:
    own_daemon.start()
    device = {"path": f"{own_daemon.home}/d", "tier": "fast", "size": "64M"}
    own_daemon.api("POST", "/v1/pools", {"name": "bad", "devices": [device]})
    own_daemon.kill()
    (own_daemon.directory("bad") / "bad-log").touch()
    own_daemon.start()
    cli = Cli(own_daemon.home)
    assert "--truncate-log" in cli.error("pool", "check", "bad")
    assert "--truncate-log" in cli.error("pool", "open", "bad")
    assert "--yes" in cli.error("pool", "check", "bad", "--truncate-log", status=2)
    assert "is sound" in cli.ok("pool", "check", "bad", "--truncate-log", "--yes")
    assert cli.ok("pool", "open", "bad") == "Pool bad is online.\n"


def test_a_device_may_be_given_once_each_or_several_after_one_option() -> None:
    assert _one_option_each(["q", "--fast", "a", "b", "--base", "c", "--force"]) == [
        *("q", "--fast", "a", "--fast", "b", "--base", "c", "--force")
    ]
    assert _one_option_each(["q", "--fast=a", "-o", "json"]) == ["q", "--fast=a", "-o", "json"]


def test_the_name_may_come_last_where_each_device_has_its_option(cli: Cli, tmp_path: Path) -> None:
    cli.ok("pool", "create", f"--fast={tmp_path}/a=64M", f"--base={tmp_path}/b=64M", "q")
    cli.ok("pool", "delete", "q", "--yes")


def on_a_terminal(home: Path, *arguments: str, answer: str = "") -> tuple[int, str]:
    """Exit status and everything that `terrace` writes to a terminal of 100 columns."""
    outside, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "terrace.cli", "--home", str(home), *arguments],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment() | {"COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(inside)
    os.write(outside, answer.encode())
    written = b""
    try:
        while chunk := os.read(outside, 65536):
            written += chunk
    except OSError:  # a pty's end of file
        pass
    os.close(outside)
    return process.wait(30), written.decode()


def test_deleting_asks_on_a_terminal_and_takes_no_for_an_answer(daemon: FakeDaemon, cli: Cli) -> None:
    cli.ok("volume", "create", "p/v", "1M")
    status, written = on_a_terminal(daemon.home, "volume", "delete", "p/v", answer="n\n")
    assert status == 1
    assert "p/v" in written
    assert "[y/N]" in written
    assert "p/v" in cli.ok("volume", "list")
    status, _ = on_a_terminal(daemon.home, "volume", "delete", "p/v", answer="y\n")
    assert status == 0
    assert "p/v" not in cli.ok("volume", "list")


def test_a_check_of_over_a_second_shows_a_bar_with_the_time_left(daemon: FakeDaemon) -> None:
    (daemon.directory("p") / "slow-check").write_text("2")
    status, written = on_a_terminal(daemon.home, "pool", "check", "p")
    (daemon.directory("p") / "slow-check").unlink()
    assert status == 0
    assert "ETA" in written
    assert "Checking pool p" in written
    quick = on_a_terminal(daemon.home, "pool", "check", "p")[1]
    assert "ETA" not in quick


def test_output_into_a_pipe_that_closes_early_is_no_error(daemon: FakeDaemon) -> None:
    script = f"{sys.executable} -m terrace.cli --home {daemon.home} status -o json | true"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("closed", "command", "said"),
    [
        (">&-", "status", "Error: writing to standard output: Bad file descriptor\n"),
        (">&-", "volume export p/v -", "Bad file descriptor"),
        ("<&-", "backup verify -", "Error: standard input is empty; name a file that terrace backup has written\n"),
        ("<&-", "volume delete p/v", "there is no terminal to ask on"),
        ("2>&-", "volume show p/none", ""),
        ("<&- >&- 2>&-", "volume show p/none", ""),
    ],
)
def test_a_standard_stream_that_is_closed_is_an_empty_or_a_full_one(
    daemon: FakeDaemon, volume: str, closed: str, command: str, said: str
) -> None:
    script = f"{sys.executable} -m terrace.cli --home {daemon.home} {command} {closed}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode in (1, 2)
    assert said in result.stderr
    assert result.stderr.count("\n") == (1 if said else 0)
    assert result.stdout == ""


def test_ctrl_c_while_the_commands_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from terrace.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "Error: stopped\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_for_terrace(shell: str) -> None:
    result = CliRunner().invoke(root, ["completion", shell])
    assert result.exit_code == 0
    assert "_TERRACE_COMPLETE" in result.stdout


def test_names_are_completed_from_those_that_exist_and_silently_without_a_daemon(
    daemon: FakeDaemon, volume: str, tmp_path: Path
) -> None:
    def completions(home: Path, line: str) -> list[str]:
        variables = {"_TERRACE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        result = subprocess.run(
            [sys.executable, "-m", "terrace.cli"],
            capture_output=True,
            text=True,
            env=environment() | variables | {"TERRACE_HOME": str(home)},
            check=False,
        )
        assert result.stderr == ""
        return [entry.partition(",")[2] for entry in result.stdout.split()]

    assert completions(daemon.home, "terrace volume show p/") == ["p/v"]
    assert completions(daemon.home, "terrace pool show ") == ["p"]
    assert "create" in completions(daemon.home, "terrace pool ")
    assert completions(tmp_path, "terrace pool show ") == []


def test_truncating_the_log_says_what_was_given_up(own_daemon: FakeDaemon, tmp_path: Path) -> None:
    own_daemon.start()
    cli = Cli(own_daemon.home)
    cli.ok("pool", "create", "t", "--fast", f"{tmp_path}/device=64M")
    own_daemon.stop()
    (own_daemon.directory("t") / "bad-log").touch()
    own_daemon.start()
    said = cli.ok("pool", "check", "t", "--truncate-log", "--yes")
    assert "given up: all after sequence 41" in said
    assert "is sound" in said
    assert "nothing was given up" not in said
    report = json.loads(cli.ok("pool", "check", "t", "--truncate-log", "--yes", "-o", "json"))
    assert "given up" in report["given_up"]
    assert "given_up" not in json.loads(cli.ok("pool", "check", "t", "-o", "json"))


@pytest.mark.parametrize(("command", "output"), [("status", "table"), ("status", "json"), ("--version", "")])
def test_output_that_can_not_be_written_is_one_line_and_status_1(cli: Cli, command: str, output: str) -> None:
    options = ["-o", output] if output else []
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "terrace.cli", "--home", str(cli.home), command, *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=30,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == "Error: writing to standard output: No space left on device\n"


def test_a_table_shows_headings_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("[policy.slow]", ">Value"), [("iops_limit", 5)])
    assert capsys.readouterr().out.splitlines()[0].split() == ["[policy.slow]", "Value"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "59 s"), (90, "1 min 30 s"), (3600, "1 h"), (3660, "1 h 1 min"), (86400, "1 d")],
)
def test_a_time_has_at_most_two_units_and_none_that_is_zero_at_its_end(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_speed_beside_a_bar_is_in_the_units_of_its_sizes() -> None:
    assert speed_text(38 << 20, 66.0) == "38 MiB/s, ETA 1 min 6 s"
    assert speed_text(1000.0, None) == "1000 B/s"


def test_a_sentence_is_wrapped_between_words_and_a_command_in_it_is_not() -> None:
    sentence = "decide whose writes are lost: `terrace volume mirror resync p/v b --discard` on a"
    assert wrapped(sentence, 80) == sentence.replace(" on a", " on\na")
    assert wrapped(sentence, 40, 2) == (
        "decide whose writes are lost:\n  `terrace volume mirror resync p/v b --discard`\n  on a"
    )
    assert wrapped(sentence, 81) == wrapped(sentence, 200) == sentence
    name = "nbd+unix:///export?socket=/run/a/path/that/is/longer/than/the/line"
    assert wrapped(f"at {name}: no", 30) == f"at\n{name}:\nno"


def test_a_table_that_fits_no_terminal_goes_on_in_the_next_line_and_cuts_no_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    name = "p/vol@before-rollback-20261129-210546"
    show_table(("Name", ">Much"), [(name, "1 MiB")], spare=(">Much",))
    assert name in capsys.readouterr().out


def test_a_table_that_is_too_wide_for_a_terminal_leaves_out_what_it_can_spare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, row = ("Name", ">Much", ">More"), ("x" * 10, "y" * 10, "z" * 10)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for width, shown in ((40, "xyz"), (36, "xyz"), (35, "xz"), (22, "x")):
        monkeypatch.setenv("COLUMNS", str(width))
        show_table(columns, [row], spare=(">Much", ">More"))
        drawn = capsys.readouterr().out.splitlines()[-1]
        assert [letter for letter in "xyz" if letter * 10 in drawn] == list(shown)
    monkeypatch.delenv("FORCE_COLOR")
    show_table(columns, [row], spare=(">Much", ">More"))
    assert capsys.readouterr().out.splitlines()[-1].split() == list(row)


def test_a_table_of_thousands_of_rows_looks_like_a_short_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"row-{number}", number) for number in range(1000, 5000)]
    show_table(("Name", ">Number"), rows[:3])
    short = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    show_table(("Name", ">Number"), rows)
    long = capsys.readouterr().out.splitlines()
    assert long[0] == short[0]
    assert long[2:5] == short[2:5]
    assert len(long) == 4002


def test_a_command_begins_without_what_only_the_daemon_needs() -> None:
    """These take half a second, for each command and each completion in a shell."""
    heavy = ["numpy", "trio", "pydantic", "starlette", "tiers.pool", "replication"]
    imports = "import sys, terrace.cli.root, terrace.cli.volume, terrace.apiclient"
    code = f"{imports}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
