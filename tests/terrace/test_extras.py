"""What is said where an optional package is missing."""

from __future__ import annotations

import tomllib

from terrace.extras import REQUIREMENTS, how_to_install
from tests.system.daemon import REPOSITORY


def test_the_packages_named_are_those_of_the_extras() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(REQUIREMENTS.values()) == sorted(extras["fuse"] + extras["plot"] + extras["tls"])


def test_the_command_is_for_the_python_that_runs() -> None:
    said = how_to_install("pyfuse3")
    assert said.endswith(" install 'pyfuse3>=3.4,<4'")
    assert said.startswith("/")
