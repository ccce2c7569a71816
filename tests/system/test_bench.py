"""The bench itself: that it measures, compares and reports. What it measures in a blink says nothing about speed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.system.daemon import REPOSITORY, environment


@pytest.mark.system
def test_the_bench_measures_terrace_and_a_peer_in_one_run(tmp_path: Path) -> None:
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
