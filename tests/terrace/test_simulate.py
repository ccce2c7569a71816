"""The simulator: what it says of loads whose answer is known, and how the command says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from terrace.cli.root import root
from terrace.simulate import Figures, Simulation
from terrace.trace import Trace, read_trace
from tests.terrace.test_cli import Cli
from tests.terrace.test_trace import SAMPLE
from tiers import Policy, TierError
from tiers.heat import Ints

MIB = 1 << 20


def trace_of(starts: Ints, *, writes: float | None = 0.0, count: int = 1, seed: int = 1) -> Trace:
    """Requests of `count` blocks; `writes`: the share of writes."""
    size = len(starts)
    is_write = np.random.default_rng(seed).random(size) < (writes or 0.0)
    one = np.ones(size, np.int64)
    return Trace(np.arange(size) / 1000, is_write, one, np.asarray(starts, np.int64), one * count)


def zipf(blocks: int, requests: int, *, exponent: float = 1.1, seed: int = 1) -> Ints:
    """Blocks by Zipf, ranks scattered."""
    rng = np.random.default_rng(seed)
    shares = np.cumsum(np.arange(1, blocks + 1) ** -exponent)
    return rng.permutation(blocks)[np.searchsorted(shares / shares[-1], rng.random(requests))]


def simulated(trace: Trace, policy: Policy | None = None, *, fast: int = 64 * MIB, base: int | None = None) -> Figures:
    return Simulation(trace, policy or Policy(), fast, base).run()


def test_hot_blocks_that_are_scattered_come_to_fast_until_hits_are_near_the_best() -> None:
    figures = simulated(trace_of(zipf(1 << 17, 500_000)), fast=32 * MIB)
    assert figures.optimal_hit_ratio is not None and figures.last_hit_ratio is not None
    assert figures.last_hit_ratio >= 0.9 * figures.optimal_hit_ratio
    assert figures.promoted_bytes < 3 * 32 * MIB, "and little more than what fits is moved"


def test_a_hot_set_that_moves_is_followed() -> None:
    before, after = zipf(1 << 16, 250_000, seed=1), zipf(1 << 16, 350_000, seed=2)
    figures = simulated(trace_of(np.concatenate((before, after))), fast=32 * MIB)
    alone = simulated(trace_of(after), fast=32 * MIB)
    assert figures.last_hit_ratio is not None and alone.last_hit_ratio is not None
    assert figures.last_hit_ratio >= 0.97 * alone.last_hit_ratio


def test_what_is_written_once_and_fits_is_never_moved() -> None:
    figures = simulated(trace_of(np.arange(4096), writes=1.0))
    assert (figures.written_bytes, figures.write_amplification) == (16 * MIB, 1.0)
    assert figures.promoted_bytes == figures.demoted_bytes == figures.rewritten_bytes == 0
    assert figures.hit_ratio is None


def test_random_writes_over_more_than_fast_holds_are_demoted_and_cleaned() -> None:
    rng = np.random.default_rng(1)
    figures = simulated(trace_of(rng.integers(0, 1 << 15, 150_000), writes=1.0), fast=32 * MIB)
    assert figures.demoted_bytes > 64 * MIB
    assert figures.write_amplification is not None and 1.5 < figures.write_amplification < 8


def test_placement_is_respected() -> None:
    trace = trace_of(zipf(1 << 14, 60_000), writes=0.0)
    on_base = simulated(trace, Policy(placement="base"))
    assert on_base.promoted_bytes == 0 and on_base.hit_ratio == 0.0
    on_fast = simulated(trace, Policy(placement="fast"))
    assert on_fast.promoted_bytes == on_fast.footprint_bytes
    auto, patient = simulated(trace), simulated(trace, Policy(promote_touches=4))
    assert on_fast.promoted_bytes > auto.promoted_bytes > patient.promoted_bytes > 0


def test_streams_are_not_promoted_and_go_past_a_full_fast_tier() -> None:
    scan = np.concatenate([np.arange(8192)] * 4)
    policy = Policy(stream_cutoff_bytes=MIB)
    assert simulated(trace_of(scan), policy).promoted_bytes <= MIB, "its first MiB is no long stream yet"
    assert simulated(trace_of(scan), Policy(stream_cutoff_bytes=0)).promoted_bytes == 32 * MIB
    streams = trace_of(np.arange(1 << 15), writes=1.0)
    figures = simulated(streams, policy, fast=32 * MIB)
    assert figures.bypassed_bytes > 64 * MIB
    assert simulated(streams, Policy(stream_cutoff_bytes=0), fast=32 * MIB).bypassed_bytes == 0


def test_the_same_trace_gives_the_same_figures_and_they_add_up() -> None:
    trace = read_trace(SAMPLE)
    figures = simulated(trace, fast=32 * MIB)
    assert figures == simulated(trace, fast=32 * MIB)
    assert figures.requests == len(trace) == 7000
    assert sum(reads for reads, _ in figures.windows) == figures.read_blocks == int(trace.counts[~trace.writes].sum())
    assert sum(hits for _, hits in figures.windows) == figures.fast_blocks
    assert figures.written_bytes == 4096 * int(trace.counts[trace.writes].sum())
    assert figures.optimal_hit_ratio is not None and figures.optimal_hit_ratio <= 1


@pytest.mark.parametrize(
    ("fast", "base", "why"),
    [
        (MIB, None, "a fast tier of 1 MiB is too small: give 32M or more"),
        (32 * MIB, MIB, "a base tier of 1 MiB is too small"),
        (32 * MIB, 32 * MIB, "give larger --fast or --base"),
    ],
)
def test_tiers_that_are_too_small_are_refused(fast: int, base: int | None, why: str) -> None:
    with pytest.raises(TierError, match=why):
        simulated(trace_of(np.arange(1 << 15)), fast=fast, base=base)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path) -> Cli:
    """`terrace` without a daemon."""
    return Cli(tmp_path / "nobody")


def test_policies_and_sizes_are_compared(offline: Cli, tmp_path: Path) -> None:
    config = tmp_path / "terraced.toml"
    config.write_text('[policy.eager]\npromote_touches = 1\ndemote_heat = 0\n[policy.never]\nplacement = "base"\n')
    arguments = ["policy", "simulate", "--trace", str(SAMPLE), "--policy-file", str(config), "--fast", "32M"]
    table = offline.ok(*arguments, "--policy", "eager", "--policy", "never", "--fast", "64M")
    assert f"{SAMPLE}, fio iolog version 3" in table
    assert [line.split()[:3] for line in table.splitlines() if line.startswith(("eager", "never"))] == [
        ["eager", "32", "MiB"],
        ["eager", "64", "MiB"],
        ["never", "32", "MiB"],
        ["never", "64", "MiB"],
    ]
    found: Any = offline.json(*arguments, "--policy", "eager", "--base", "1G")
    assert found["trace"]["requests"] == 7000
    (run,) = found["runs"]
    assert (run["policy"], run["fast_bytes"], run["base_bytes"]) == ("eager", 32 * MIB, 1 << 30)
    assert 0 < run["hit_ratio"] <= 1 and run["promoted_bytes"] > 0


def test_bad_input_is_named(offline: Cli, tmp_path: Path) -> None:
    trace = ["policy", "simulate", "--trace", str(SAMPLE)]
    assert "Missing option '--fast'" in offline.error(*trace, status=2)
    assert "no policy 'gold'" in offline.error(*trace, "--fast", "64M", "--policy", "gold")
    config = tmp_path / "c.toml"
    config.write_text("[policy.gold]\npromote_tuches = 3\n")
    assert "promote_touches" in offline.error(*trace, "--fast", "64M", "--policy-file", str(config))
    config.write_text("[policy.gold]\n")
    assert "it has default, gold" in offline.error(
        *trace, "--fast", "64M", "--policy-file", str(config), "--policy", "silver"
    )
    assert "too small" in offline.error(*trace, "--fast", "1M")
    assert "64Q" in offline.error(*trace, "--fast", "64Q", status=2)
    (tmp_path / "bad").write_text("fio version 2 iolog\nx read 1\n")
    said = offline.error("policy", "simulate", "--trace", str(tmp_path / "bad"), "--fast", "64M")
    assert f"{tmp_path}/bad, line 2" in said
    assert "No such file" in offline.error("policy", "simulate", "--trace", str(tmp_path / "none"), "--fast", "64M")
    assert CliRunner().invoke(root, ["policy", "simulate", "--help"]).exit_code == 0
