"""The bench itself: that it measures, compares and reports. What it measures in a blink says nothing about speed."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.system.daemon import REPOSITORY, environment


@pytest.mark.system
def test_the_bench_measures_terrace_and_a_peer_in_one_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("b")  # Linux allows 107 bytes in the name of a daemon's socket
    report = tmp_path / "report.json"
    command = ["scripts/bench", "--only", "throughput", "--servers", "terrace", "qemu-nbd raw"]
    command += ["--seconds", "0.2", "--rounds", "1", "--size", "64M", "--dir", str(tmp_path), "--json", str(report)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(report.read_text())["throughput"]
    assert len(rows) == 7
    for row in rows:
        assert row["ratio"]["qemu-nbd raw"] > 0
        assert row["stall_max_ms"] >= 0
        assert (row["passed"] is None) == (row["target_ratio"] is None)
        assert row["workload"] in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the bench, which is no package."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "lib"))
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if name.startswith(("bench", "slow_")):
            del sys.modules[name]


def test_the_slowed_disk_takes_its_time_for_seeks_and_bytes(part: Any) -> None:
    disk = part("slow_disk")
    head = disk.Head()
    head.serve([(1 << 30, 4096)])
    assert head.busy_s == pytest.approx(disk.SEEK_S + 4096 / disk.BYTES_PER_S)
    head.serve([((1 << 30) + 4096, 1 << 20)])
    assert head.seeks == 1, "what goes on where the last access ended costs no seek"
    assert head.busy_s == pytest.approx(disk.SEEK_S + (4096 + (1 << 20)) / disk.BYTES_PER_S)
    start_s = time.monotonic()
    head.serve([(0, 4096), (1 << 25, 4096), (0, 4096)])
    assert head.seeks == 4
    assert time.monotonic() - start_s >= 3 * disk.SEEK_S
    assert disk.merged([(8192, 4096), (0, 4096), (4096, 4096), (0, 4096), (1 << 20, 10)]) == [(0, 12288), (1 << 20, 10)]


def test_the_theory_of_greedy_cleaning_is_what_its_equation_says(part: Any) -> None:
    theory = part("bench_wa").theory
    assert theory(0.8) == pytest.approx(2.69, abs=0.01)
    for full in (0.5, 0.7, 0.9, 0.95):
        v = 1 - 1 / theory(full)
        assert (v - 1) / math.log(v) == pytest.approx(full)


def test_the_optimal_hit_ratio_is_that_of_the_hottest_units(part: Any) -> None:
    optimum = part("bench_tiering").optimal_hit_ratio
    assert optimum(1 << 16, 1 << 16, 1) == pytest.approx(1)
    fine, coarse = optimum(1 << 16, 1 << 13, 1), optimum(1 << 16, 1 << 13, 16)
    assert 0.125 < coarse < fine < 1
