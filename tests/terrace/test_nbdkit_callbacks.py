"""The plugin's parts that decide: parameters, names, where packages are looked for, how requests are cut."""

from __future__ import annotations

import importlib
import itertools
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from terrace.nbdkit_plugin import choose, environments
from tiers import TierError
from tiers.closed import ClosedPool


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, in a process that isn't nbdkit."""
    monkeypatch.setitem(sys.modules, "nbdkit", types.ModuleType("nbdkit"))
    monkeypatch.delitem(sys.modules, "terrace.nbdkit_callbacks", raising=False)
    yield importlib.import_module("terrace.nbdkit_callbacks")
    del sys.modules["terrace.nbdkit_callbacks"]


def test_a_pool_is_a_directory_with_a_slash_and_a_name_below_the_home_without(
    callbacks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "pools" / "p").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "home" / "pools" / "p"
    for parameters in ({"pool": "p", "home": "home"}, {"pool": "home/pools/p"}, {"pool": str(expected)}):
        where = callbacks.judge(parameters)
        assert where.directory == expected
        assert where.volume is None
    monkeypatch.setenv("TERRACE_HOME", str(tmp_path / "home"))
    assert callbacks.judge({"pool": "p", "volume": "v"}).directory == expected


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "pool= is missing"),
        ({"pool": "nope", "home": "/nowhere"}, "there is no pool 'nope' in /nowhere/pools"),
        ({"pool": "./p", "home": "/nowhere"}, "leave one out"),
        ({"pool": "./p", "config": "/nowhere.toml"}, "/nowhere.toml: can't be read"),
    ],
)
def test_parameters_that_mean_nothing_are_refused_in_one_line(
    callbacks: Any, parameters: dict[str, str], words: str
) -> None:
    with pytest.raises(TierError, match=words) as refused:
        callbacks.judge(parameters)
    assert "\n" not in str(refused.value)


def test_unknown_empty_and_repeated_parameters_are_refused(callbacks: Any) -> None:
    callbacks.config("pool", "p")
    for key, value, words in (("pool", "q", "given twice"), ("volume", "", "is empty"), ("vol", "v", "no parameter")):
        with pytest.raises(callbacks.Refused, match=words):
            callbacks.config(key, value)


def test_the_policies_of_a_configuration_are_those_of_the_pool(callbacks: Any, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[policy.slow]\niops_limit = 10\n")
    where = callbacks.judge({"pool": str(tmp_path), "config": str(tmp_path / "c.toml")})
    assert "slow" in where.config.policies()


def test_a_name_that_a_closed_pool_does_not_have_is_refused(callbacks: Any) -> None:
    closed = ClosedPool("p", {"v", "v@s"})
    for name in ("v", "v@s", "p/v", "p/v@s"):
        callbacks.require_export(closed, name)
    for name, words in (("w", "no volume 'w'"), ("v@t", "no snapshot 'v@t'"), ("q/v", "not 'q'")):
        with pytest.raises(TierError, match=words):
            callbacks.require_export(closed, name)


@pytest.mark.parametrize(("offset", "length"), [(0, 1 << 20), (5, 3 << 20), ((1 << 20) - 1, 2), (12345, 9 << 20)])
def test_pieces_cover_a_request_and_split_no_block(callbacks: Any, offset: int, length: int) -> None:
    pieces = list(callbacks.pieces(offset, length))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == length
    for (_, end), (start, _) in itertools.pairwise(pieces):
        assert end == start
        assert (offset + end) % (1 << 20) == 0
    assert all(0 < end - start <= 1 << 20 for start, end in pieces)


def test_refusals_are_logged_as_a_sentence_and_bugs_with_their_traceback(
    callbacks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traceback, "format_exception", traceback.format_exception)
    callbacks.speak_shortly()
    for error, lines in ((callbacks.Refused("no such pool"), ["no such pool"]), (ValueError("a bug"), None)):
        try:
            raise error
        except Exception as caught:
            told = traceback.format_exception(type(caught), caught, caught.__traceback__)
        assert told == lines or (lines is None and told[0].startswith("Traceback"))


def test_packages_are_those_of_the_environment_that_the_plugin_is_in_or_beside(tmp_path: Path) -> None:
    version = (3, 11)
    for installed in ("lib/python3.11/site-packages", ".venv/lib/python3.11/site-packages"):
        (tmp_path / installed).mkdir(parents=True)
    beside, _ = choose(environments(tmp_path, None), version)
    assert beside == tmp_path / ".venv/lib/python3.11/site-packages"
    inside, _ = choose(environments(tmp_path / "lib/python3.11/site-packages", "/nowhere"), version)
    assert inside == tmp_path / "lib/python3.11/site-packages"
    active, _ = choose(environments(tmp_path / "checkout", str(tmp_path / ".venv")), version)
    assert active == tmp_path / ".venv/lib/python3.11/site-packages"


def test_an_environment_of_another_python_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / ".venv/lib/python3.12/site-packages").mkdir(parents=True)
    for root in (tmp_path, tmp_path / ".venv/lib/python3.12/site-packages"):
        found, why = choose(environments(root, None), (3, 11))
        assert found is None
        assert "nbdkit's Python is 3.11" in why
        assert "is of another version" in why
        assert "python3.11" in why
    assert "no environment" in choose(environments(tmp_path / "else", None), (3, 11))[1]
