"""The policy of a volume: its name is state that survives, its meaning comes from the application."""

import errno
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from tests.tiers.helpers import QUIET, assert_sound, fresh_pool, make_pool, refusal, run
from tiers import Policy, Pool, rebuild_catalog
from tiers.layout import MIB
from tiers.policy import DEFAULT

REPOSITORY = Path(__file__).parents[2]
GOLD, SILVER = Policy("gold", iops_limit=100), Policy("silver", placement="base")
DEFINED = {"gold": GOLD, "silver": SILVER}


def names(pool: Pool) -> dict[str, str]:
    return {volume.short_name: volume.policy_name for volume in pool.volumes()}


def test_a_policy_survives_closing_killing_and_the_loss_of_the_catalog(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys, trio
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.tiers.test_volume_policy import DEFINED
from tests.tiers.helpers import QUIET
from tiers import Pool
async def main():
    async with Pool.open(Path(sys.argv[1]), settings=QUIET) as pool:
        pool.define_policies(DEFINED)
        await pool.set_policy("a", "silver")
        await pool.set_policy("b", "")
        await pool.create_volume("c", 4096, "gold")
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""

    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            pool.define_policies(DEFINED)
            for name in "ab":
                await pool.create_volume(name, MIB, "gold")
        async with Pool.open(home, settings=QUIET) as pool:
            assert names(pool) == {"a": "gold", "b": "gold"}
        killed = await trio.run_process([sys.executable, "-c", script, str(home)], check=False, capture_stderr=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        expected = {"a": "silver", "b": "", "c": "gold"}
        async with Pool.open(home, settings=QUIET) as pool:
            assert names(pool) == expected
            await assert_sound(pool)
        for file in home.glob("catalog*"):
            file.unlink()
        await rebuild_catalog(home, "p", [tmp_path / "fast.img"], force=False)
        async with Pool.open(home, settings=QUIET) as pool:
            assert names(pool) == expected
            await assert_sound(pool)

    run(body)


def test_a_volume_whose_policy_is_not_defined_runs_with_the_default_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        home = await make_pool(tmp_path)
        async with Pool.open(home, settings=QUIET) as pool:
            pool.define_policies(DEFINED)
            await pool.create_volume("v", MIB, "gold")
        other = Policy("default", promote_touches=7)
        async with Pool.open(home, settings=QUIET) as pool:
            volume = pool.volume("v")
            assert (volume.policy, volume.policy_missing) == (DEFAULT, False)  # nobody has said anything yet
            with caplog.at_level(logging.WARNING):
                pool.define_policies({"default": other, "silver": SILVER})
            assert "p/v has the policy 'gold', which is not defined" in caplog.text
            assert (volume.policy, volume.policy_missing) == (other, True)
            (status,) = pool.status().volumes
            assert (status.policy, status.policy_missing) == ("gold", True)
            await pool.set_policy("v", "silver")
            assert (volume.policy, volume.policy_missing) == (SILVER, False)

    run(body)


def test_an_unknown_policy_is_refused_with_the_nearest_one_and_changes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            pool.define_policies(DEFINED)
            await pool.create_volume("v", MIB, "gold")
            before = pool.status().log_seq
            error = await refusal(lambda: pool.set_policy("v", "sliver"))
            assert error.errno == errno.ENOENT
            assert "there is no policy 'sliver': did you mean 'silver'? `terrace policy list`" in str(error)
            assert (await refusal(lambda: pool.create_volume("w", MIB, "x"))).errno == errno.ENOENT
            assert (pool.status().log_seq, names(pool)) == (before, {"v": "gold"})

    run(body)


def test_a_policy_that_vanishes_while_its_volume_waits_for_room_is_not_given(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path) as pool:
            pool.define_policies(DEFINED)
            volume = await pool.create_volume("v", MIB)
            engine = pool._engine
            honest, waiting = engine.admit_release, trio.Event()

            async def admit(pages: int = 0, *, kept_anyway: bool = False) -> None:
                waiting.set()
                await trio.sleep(0.05)
                await honest(pages, kept_anyway=kept_anyway)

            engine.admit_release = admit  # type: ignore[method-assign]
            async with trio.open_nursery() as nursery:

                async def give() -> None:
                    assert (await refusal(lambda: pool.set_policy("v", "gold"))).errno == errno.ENOENT

                nursery.start_soon(give)
                await waiting.wait()
                pool.define_policies({"silver": SILVER})
            assert volume.policy_name == ""

    run(body)


def test_a_policy_can_be_changed_in_a_pool_that_is_full(tmp_path: Path) -> None:
    async def body() -> None:
        async with fresh_pool(tmp_path, fast_mib=40) as pool:
            pool.define_policies(DEFINED)
            volume = await pool.create_volume("v", 100 * MIB)
            data = os.urandom(MIB)
            with pytest.raises(OSError, match="is full"):
                for at in range(100):
                    await volume.write(at * MIB, data)
            await pool.set_policy("v", "gold")
            assert volume.policy is GOLD

    run(body)
