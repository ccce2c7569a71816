"""`terrace volume heat`: the map in a terminal, for programs, and as a picture."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest

from terrace.cli.heat import draw, show
from tests.terrace.fakedaemon import FakeDaemon
from tests.terrace.test_cli import Cli
from tests.terrace.test_cli import cli as cli
from tests.terrace.test_cli import volume as volume

MIB = 1 << 20


def a_map(count: int = 40, **changes: Any) -> dict[str, Any]:
    """Half on base and cold, a quarter on fast and hot, the rest nothing."""
    lists: dict[str, Any] = {
        "fast_bytes": [MIB if i % 4 == 0 else 0 for i in range(count)],
        "base_bytes": [MIB // 4 if i % 2 else 0 for i in range(count)],
        "fast_heat": [100.0 if i % 4 == 0 else 0.0 for i in range(count)],
        "base_heat": [0.1 if i % 2 else 0.0 for i in range(count)],
        "reads": [float(i) for i in range(count)],
        "writes": [0.0] * count,
    }
    size = {"volume": "p/v", "size_bytes": count * MIB, "range_bytes": MIB, "half_life_s": 3600.0, "looked_at": 1.0}
    return size | lists | changes


def test_the_map_shows_each_tier_s_share_and_heat(capsys: pytest.CaptureFixture[str]) -> None:
    show(a_map(), 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "p/v, 40 MiB, 1 MiB a column"
    assert "fast" in lines[1] and "25 %  10 MiB, 100 touches a block" in lines[1]
    assert "base" in lines[2] and "12 %  5 MiB, 0.1 touches a block" in lines[2]
    assert "nothing" in lines[3] and "62 %  25 MiB" in lines[3]
    assert "      0 B fast █···█···█···█···█···" in lines[5]
    assert "          base ·░·░·░·░·░·░·░·░·░·░" in lines[6]
    assert lines[7].startswith("   20 MiB fast")
    assert "halved each 1 h" in lines[-2]


def test_what_was_not_looked_at_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = a_map(4, looked_at=0.25, fast_bytes=[None] * 4, base_bytes=[None] * 4, fast_heat=[None] * 4)
    show(found | {"base_heat": [None] * 4}, 20)
    out = capsys.readouterr().out
    assert "Estimated from 25 % of the volume's map." in out
    assert "fast ????" in out and "? not looked at" in out


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_drawn_also_of_what_is_unknown_or_empty(tmp_path: Path, kind: str) -> None:
    unknown = a_map(3, fast_bytes=[None] * 3, fast_heat=[None] * 3, looked_at=0.1)
    empty = a_map(1, size_bytes=4096, range_bytes=65536, fast_bytes=[0], base_bytes=[0])
    for number, found in enumerate((a_map(), unknown, empty)):
        path = tmp_path / f"{number}.{kind}"
        draw(found, path)
        data = path.read_bytes()
        if kind == "png":
            width, height = struct.unpack(">II", data[16:24])
            assert data.startswith(b"\x89PNG") and width > 1000 and height > 500
        else:
            assert b"<svg" in data and data.rstrip().endswith(b"</svg>")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_command_asks_the_daemon_and_draws(cli: Cli, volume: str, tmp_path: Path) -> None:
    assert "p/v, 1 MiB, 64 KiB a column" in cli.ok("volume", "heat", volume)
    found: Any = cli.json("volume", "heat", volume)
    assert found["volume"] == volume and len(found["reads"]) == 16
    assert len(cli.json("volume", "heat", volume, "--ranges", "3")["reads"]) == 3  # type: ignore[call-overload, index]
    path = tmp_path / "map.png"
    assert cli.ok("volume", "heat", volume, "--output", str(path)) == f"The heat map of p/v is in {path}.\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (
        b"<svg"
        in (cli.ok("volume", "heat", volume, "-o", str(tmp_path / "m.svg")), (tmp_path / "m.svg").read_bytes())[1]
    )


def test_bad_input_is_named(cli: Cli, volume: str, tmp_path: Path) -> None:
    assert "no volume" in cli.error("volume", "heat", "p/none")
    assert "'x.jpg' is neither table nor json, nor a file that ends with .png or .svg" in cli.error(
        "volume", "heat", volume, "-o", "x.jpg", status=2
    )
    assert "4096" in cli.error("volume", "heat", volume, "--ranges", "5000", status=2)
    path = tmp_path / "none" / "map.svg"
    assert f"writing {path}: No such file or directory" in cli.error("volume", "heat", volume, "-o", str(path))
    (tmp_path / "dir.png").mkdir()
    assert "Is a directory" in cli.error("volume", "heat", volume, "-o", str(tmp_path / "dir.png"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".new")] == ["dir.png"]


@pytest.mark.parametrize("ranges", ["0", "4097", "x", "-1", "9" * 50, "٣"])
def test_the_api_names_ranges_that_can_not_be(daemon: FakeDaemon, cli: Cli, volume: str, ranges: str) -> None:
    from terrace.apiclient import ApiClient, ApiError

    with ApiClient(daemon.home / "api.sock") as client, pytest.raises(ApiError, match="from 1 to 4096"):
        client.get("pools", "p", "volumes", "v", "heat", ranges=ranges)


def test_without_matplotlib_the_way_to_it_is_told(
    cli: Cli, volume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    said = cli.error("volume", "heat", volume, "-o", str(tmp_path / "m.png"))
    assert "pip install 'matplotlib>=" in said
    assert "p/v" in cli.ok("volume", "heat", volume), "the terminal needs no matplotlib"
