"""The home: found where the contract says, held by one process at a time."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from terrace.home import Home, HomeError, find_home


def test_the_option_wins_over_the_environment_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_home(None).path == Path("/var/lib/terrace")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert find_home(None).path == Path("/data/terrace")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert find_home(None).path == Path("/home/somebody/.local/share/terrace")
    monkeypatch.setenv("TERRACE_HOME", "/elsewhere")
    assert find_home(None).path == Path("/elsewhere")
    assert find_home("/option").path == Path("/option")


def test_a_relative_home_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_home("home").path == tmp_path / "home"


def test_a_new_home_is_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "home")
    with home.locked():
        assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
        assert home.pools.is_dir()


def test_a_held_home_is_refused_naming_the_holder_and_free_again_afterwards(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    words = rf"\({os.getpid()}\) has {tmp_path}.*--home"
    with home.locked(), pytest.raises(HomeError, match=words) as refusal, home.locked():
        pass
    assert refusal.value.errno == errno.EBUSY
    with home.locked():
        pass


def test_a_lock_file_that_a_dead_daemon_left_behind_holds_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (tmp_path / "terraced.lock").write_text("99999999 and some garbage\n")
    with home.locked():
        assert (tmp_path / "terraced.lock").read_text() == f"{os.getpid()}\n"


def test_a_home_too_long_for_sockets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 120))
    with pytest.raises(HomeError, match="107") as refusal, home.locked():
        pass
    assert refusal.value.errno == errno.ENAMETOOLONG
    assert not home.path.exists()


def test_a_home_that_can_not_be_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match="can't be the home"), Home(tmp_path / "file" / "home").locked():
        pass
