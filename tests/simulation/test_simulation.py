"""Fixed seeds, every failpoint, and proof that a seed is one exact run and that what breaks the promise is found."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import trio

from tests.simulation.failpoints import failpoint_names
from tests.simulation.faults import Faults
from tests.simulation.machine import SEGMENT_BYTES, Machine, PowerCutError
from tests.simulation.oracle import require_sound
from tests.simulation.workload import PROFILES, Crash, Run, random_faults
from tiers import DeviceSpec, failpoint
from tiers.layout import LABEL_AREA_BYTES

ROOT = Path(__file__).parents[2]

REGRESSIONS = {
    "the cleaner wrote packed segments anew for ever, for the sake of their tails": Run(6, "full"),
    "a writer that waits while the cleaner rests made the checkpointer spin": Run(1, "full"),
    "a block that the medium can't give ended the log, and flushed writes were gone": Run(472019300258, "full"),
    "a check of a read-only pool took a place that was given out again for damage": Run(472019300588, "full"),
    "the oracle expected what a sync that failed in a recovery had dropped": Run(583379135260, "faults"),
    "the workload took a round of syncs for a flush, though the log was broken": Run(878350833001, "faults"),
    "the oracle took for durable what a pool showed that could not be synced": Run(441198627317, "full"),
    "a check of a read-only pool took what a crash left at a place that was given out again for damage": Run(
        403492401776, "full"
    ),
    "a stream that had gone past the log was undone when the device that held it was lost": Run(28, "devices"),
    "an index passed a snapshot over where the map page above was lost since": Run(1151, "versions"),
    "a machine that was off wiped the label of a device that its catalog had just learnt of": Run(
        678856941322, "failing"
    ),
    "the workload took a refused creation for gone, over whose record nothing could be put": Run(
        944972175463, "faults"
    ),
    "the workload took an end for clean in which a sync that had begun before it failed": Run(894110415070, "failing"),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_bug_that_was_found_stays_away(name: str) -> None:
    REGRESSIONS[name].live()


def test_a_pool_that_became_read_only_after_a_delete_is_sound() -> None:
    machine = Machine(seed=1)

    async def main() -> None:
        async with machine.open() as pool:
            for name in ("kept", "deleted"):
                volume = await pool.create_volume(name, 1 << 20)
                await volume.write(0, b"x" * 40000)
            await pool.checkpoint()
            await pool.delete_volume("deleted")
            machine.stop()
        machine.power_cut()
        machine.media[0].failing_syncs = 1
        async with machine.open() as pool:
            assert pool.status().state == "read-only"
            assert [volume.short_name for volume in pool.volumes()] == ["kept"]
            await require_sound(pool, known=" is poisoned: ")

    machine.run(main)


@pytest.mark.parametrize(
    ("profile", "seed"), [(name, seed) for name, kind in PROFILES.items() for seed in range(6 if kind.loses else 12)]
)
def test_no_crash_and_no_fault_breaks_the_promise(profile: str, seed: int) -> None:
    run = Run(seed, profile)
    print(run.command())
    run.live()


@pytest.mark.parametrize("crash", [(1, None, None), (None, None, ("grow.labelled", 0))])
@pytest.mark.parametrize("seed", range(6))
def test_a_crash_while_the_catalog_learns_of_a_device_leaves_it_labelled(seed: int, crash: Crash) -> None:
    machine = Machine(seed=seed)

    async def main() -> None:
        with contextlib.suppress(PowerCutError):
            async with machine.open() as pool:
                machine.on_hit["grow.labelled"] = lambda: machine.arm(crash)
                await pool.grow([DeviceSpec(Path("/simulated/more"), "base", LABEL_AREA_BYTES + 64 * SEGMENT_BYTES)])
        assert machine.is_off and [medium.path for medium in machine.media][1:] == ["/simulated/more"]
        machine.power_cut()
        async with machine.open() as pool:
            assert len(pool.status().devices) == len(machine.state.devices)

    machine.run(main)


def test_blocks_that_were_given_up_are_met_again() -> None:
    assert sum(Run(seed, "lost").live().found_lost for seed in (0, 1)) > 50


def test_the_faults_really_happen() -> None:
    drivers = [Run(seed, profile).live() for profile in ("faults", "full") for seed in range(12, 18)]
    assert sum(driver.full_errors for driver in drivers) > 50
    assert sum(driver.cycles for driver in drivers) > len(drivers)
    assert any(driver.poisoned for driver in drivers) and any(driver.read_errors for driver in drivers)


# -- failpoints --------------------------------------------------------------------------------------------------------

BEFORE = {"recovery.moved": ("move.logged",)}
"""Where to crash first, so that there is something to come to."""
NEEDED: dict[str, Callable[[Faults], bool]] = {
    "move.bad": lambda faults: faults.read_spells > 0.01,
    "poison": lambda faults: faults.failed_sync > 0.3 and faults.refused_writes < 0.01,
    "checkpoint.failed": lambda faults: faults.refused_writes > 0.01,
    "log.damaged": lambda faults: faults.refused_writes > 0.01,
    "evacuate.page_lost": lambda faults: faults.read_spells > 0.01 and faults.failed_sync < 0.01,
}
"""Faults without which a failpoint is not come to."""


def _seeds_for(name: str) -> Iterator[int]:
    needed = next((check for prefix, check in NEEDED.items() if name.startswith(prefix)), lambda faults: True)
    return (seed for seed in range(400) if needed(random_faults(seed)))


OF_SNAPSHOTS = (
    *(f"checkpoint.{step}" for step in ("absorbed", "dropped", "folded", "kept", "relocated", "thinned")),
    "flatten.",
    "move.relocated",
)


def _profile_for(name: str) -> str:
    if name.startswith(OF_SNAPSHOTS):
        return "versions"
    if name == "evacuate.page_lost":
        return "failing"
    return "devices" if name.startswith(("evacuate.", "grow.", "checkpoint.given_up")) else "full"


@pytest.mark.parametrize("name", failpoint_names())
def test_a_crash_is_recovered_from_at(name: str) -> None:
    for _, seed in zip(range(40), _seeds_for(name), strict=False):
        run = Run(seed, _profile_for(name), (*BEFORE.get(name, ()), name))
        print(run.command())
        if run.live().crashed_at[name]:
            return
    pytest.fail(f"no seed comes to {name}")


def test_failpoints_do_nothing_unless_a_test_is_watching() -> None:
    seen: list[str] = []
    failpoint.hit("nobody.looks")
    with failpoint.watching(seen.append):
        failpoint.hit("somebody.looks")
    failpoint.hit("nobody.looks")
    assert seen == ["somebody.looks"]
    assert len(failpoint_names()) > 40


# -- one seed is one run -----------------------------------------------------------------------------------------------

_DIGESTS = """
import sys
from tests.simulation.workload import Run
for seed in map(int, sys.argv[1:]):
    print(seed, Run.of(seed).live(digest=True).machine.fingerprint())
"""


def test_the_same_seed_is_the_same_run_in_every_process() -> None:
    def digests(seeds: list[int], hash_seed: str) -> set[str]:
        result = subprocess.run(
            [sys.executable, "-c", _DIGESTS, *map(str, seeds)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        return set(result.stdout.splitlines())

    seeds = list(range(200, 209))
    first, second = digests(seeds, "1"), digests(seeds[::-1], "4242")
    assert len(first) == len(seeds) == len({line.split()[1] for line in first})
    assert first == second


def test_the_digest_sees_one_bit_on_a_medium() -> None:
    driver = Run(3, "crashes").live(digest=True)
    before = driver.machine.digest.copy()
    print_ = driver.machine.fingerprint()
    driver.machine.digest = before
    driver.machine.media[0].flip(driver.machine.media[0].size - 1)
    assert driver.machine.fingerprint() != print_


# -- the tools ---------------------------------------------------------------------------------------------------------


def _soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation.soak", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_soak_finds_a_planted_bug_and_says_how_to_replay_it() -> None:
    result = _soak("--minutes", "2", "--seed", "0", "--workers", "1", "--plant", "a-disk-whose-sync-does-nothing")
    assert result.returncode == 1, result.stdout + result.stderr
    command = re.search(r"^replay: python (.*)$", result.stdout, re.MULTILINE)
    assert command is not None
    replayed = subprocess.run(
        [sys.executable, *command[1].split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert replayed.returncode == 1
    assert f"replay: python {command[1]}" in replayed.stdout
    failure = re.search(r"^FAILED: seed \d+: (.*)$", result.stdout, re.MULTILINE)
    assert failure is not None and failure[1][:200] in replayed.stderr


def test_a_soak_of_a_sound_engine_ends_well_when_it_has_its_cycles() -> None:
    began = time.monotonic()
    result = _soak("--minutes", "4", "--cycles", "5", "--seed", "0", "--profile", "crashes")
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - began < 200
    assert re.search(r"^\d+ crashes recovered from, .* 0 failed$", result.stdout, re.MULTILINE)


def test_an_interrupted_soak_ends_with_its_summary_and_leaves_no_worker() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.simulation.soak", "--minutes", "5", "--seed", "77", "--workers", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline().startswith("seeds from 77 on")
            while not (workers := psutil.Process(process.pid).children()):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert rest.startswith("interrupted\n") and "crashes recovered from" in rest
    assert not any(worker.is_running() for worker in workers)


def test_a_soak_refuses_what_it_does_not_know() -> None:
    result = _soak("--profile", "sunshine")
    assert result.returncode == 2 and "sunshine" in result.stderr


# -- crashing anywhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("countdown", [1, 2, 50, 333, 1001])
def test_a_crash_can_come_before_any_step_of_any_task(countdown: int) -> None:
    machine = Machine(seed=1)
    left: list[tuple[int, int, bytes]] = []

    def present() -> tuple[int, int, bytes]:
        return machine.steps, machine.commits, bytes(machine.media[0].cache)

    async def main() -> None:
        machine.task_countdown = countdown
        with contextlib.suppress(PowerCutError):
            async with machine.open() as pool:
                planned = machine.on_off

                def look_and_go_off() -> None:
                    left.append(present())
                    planned()

                machine.on_off = look_and_go_off
                volume = await pool.create_volume("v", 1 << 20)
                while True:
                    await volume.write(0, bytes([len(left) + 1]) * 4096)
                    await pool.checkpoint()

    machine.run(main)
    assert machine.is_off
    assert all(state == present() for state in left)
    assert left or countdown < 1000


def test_an_engine_that_goes_in_circles_is_told_of() -> None:
    machine = Machine(seed=1)

    async def main() -> None:
        async with machine.open():
            while True:
                await trio.lowlevel.checkpoint()

    machine.run(main)
    assert machine.goes_in_circles
