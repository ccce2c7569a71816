"""The nbdkit plugin, in a real nbdkit: what it offers, its filters and TLS over it, its end, and what it refuses."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.system import nbdclient
from tests.system.conftest import Run
from tests.system.daemon import Daemon
from tests.system.nbdkit import MIB, PLUGIN, Nbdkit, command, environment, inspect, make_pool, once
from tiers import Pool
from tiers.rotational import rotates

pytestmark = pytest.mark.system


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Closed, with the volume `v` of 32 MiB."""
    return make_pool(tmp_path / "home", volumes={"v": 32 * MIB})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nbdkit]:
    """A server with all volumes of a pool: `v` of 32 MiB and `w` of 1 MiB. Ends in order, and leaves a sound pool."""
    directory = tmp_path_factory.mktemp("served")
    pool = make_pool(directory / "home", volumes={"v": 32 * MIB, "w": MIB})
    with Nbdkit(directory, f"pool={pool}") as server:
        yield server
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    assert inspect(pool) == {"replayed": 0, "problems": [], "volumes": ["p/v", "p/w"]}


def digests(home: Path) -> dict[str, str]:
    """Of all that a pool is made of: its catalog and its device."""
    files = [*home.rglob("catalog.sqlite*"), *home.rglob("*.img")]
    assert len(files) >= 2
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shell(uri: str, *lines: str, connect: str = "") -> str:
    """Runs lines of nbdsh, libnbd's Python, in which `h` is connected."""
    script = "\n".join([connect or f"h.connect_uri({uri!r})", *lines])
    result = subprocess.run(
        ["nbdsh", "-c", script],
        cwd="/",
        env=environment() | {"PATH": "/usr/bin:/bin"},  # libnbd's module is the distribution's Python's
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# -- what it offers ----------------------------------------------------------------------------------------------------


def test_nbdinfo_shows_what_the_volume_is(served: Nbdkit, run: Run, tmp_path: Path) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.uri("p/v")))["exports"]
    assert export["export-size"] == 32 * MIB
    assert export["description"] == "32 MiB volume"
    assert "base:allocation" in export["contexts"]
    can = {"can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_fast_zero", "can_cache", "can_df"}
    assert {name for name in can if not export[name]} == set()
    assert not export["is_read_only"]
    with (tmp_path / "beside").open("w") as file:
        assert export["is_rotational"] is rotates(file.fileno())
    assert [export[f"block_size_{what}"] for what in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MIB]


def test_clients_choose_a_volume_by_export_name(served: Nbdkit, run: Run) -> None:
    listed = json.loads(run("nbdinfo", "--json", "--list", served.uri()))
    assert {one["export-name"]: one["export-size"] for one in listed["exports"]} == {"p/v": 32 * MIB, "p/w": MIB}
    assert run("nbdinfo", "--size", served.uri("w")).strip() == str(MIB), "the pool's name may be left out"
    for unknown in ("nope", "q/v", ""):  # two volumes, so none is the default
        with pytest.raises(nbdclient.Refused):
            nbdclient.Connection(served.socket, unknown)


def test_zeroes_trims_and_extents_mean_what_the_protocol_says(served: Nbdkit) -> None:
    told = shell(
        served.uri("p/v"),
        "h = nbd.NBD()",
        "h.add_meta_context('base:allocation')",
        f"h.connect_uri({served.uri('p/v')!r})",
        "h.trim(32 << 20, 0)",
        "def extents(count, offset, flags=0):",
        "    found = []",
        "    h.block_status(count, offset, lambda name, at, e, err: found.append(e), flags)",
        "    print(found[0])",
        "h.pwrite(b'x' * (1 << 20), 1 << 20)",
        "extents(4 << 20, 0)",
        "h.zero(65536, 1 << 20)",  # may become a hole
        "h.zero(65536, (1 << 20) + 65536, nbd.CMD_FLAG_NO_HOLE)",
        "h.zero(65536, (1 << 20) + 262144, nbd.CMD_FLAG_FAST_ZERO)",
        "h.zero(1000, (1 << 20) + 500000, nbd.CMD_FLAG_FUA)",
        "h.trim(65536, (1 << 20) + 131072, nbd.CMD_FLAG_FUA)",
        "extents(1 << 20, 1 << 20)",
        "extents(1 << 20, 1 << 20, nbd.CMD_FLAG_REQ_ONE)",
        "try: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)",
        "except nbd.Error as e: print(e.errnum)",
        "data = bytearray(h.pread(1 << 20, 1 << 20))",
        "expected = bytearray(b'x' * (1 << 20))",
        "for start, length in ((0, 196608), (262144, 65536), (500000, 1000)):",
        "    expected[start:start + length] = bytes(length)",
        "print(data == expected)",
        "h.cache(1 << 20, 0)",
        "h.flush()",
        connect="import nbd",
    ).splitlines()
    hole = 3
    assert json.loads(told[0]) == [MIB, hole, MIB, 0, 2 * MIB, hole]
    # NO_HOLE's 64 KiB are allocated; the zeroes at 500,000 lie inside of blocks.
    assert json.loads(told[1]) == [65536, hole, 65536, 0, 65536, hole, 65536, 0, 65536, hole, MIB - 327680, 0]
    assert json.loads(told[2]) == [65536, hole]
    assert told[3:] == [str(errno.EOPNOTSUPP), "True"]


def test_fua_and_unaligned_and_long_requests_keep_every_byte(served: Nbdkit) -> None:
    data = random.Random(1).randbytes(9 * MIB)
    with nbdclient.Connection(served.socket, "p/v") as client:
        client.write(12_345, data, nbdclient.FUA)
        client.write(4095, b"ab")
        assert client.read(12_345, len(data)) == data
        assert client.read(4094, 4) == b"\0ab\0"


def test_a_pool_without_room_is_no_space_for_the_client_and_the_server_lives(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "home", volumes={"v": 1024 * MIB}, fast_mib=32)
    with Nbdkit(tmp_path, f"pool={pool}", "volume=v") as server:
        told = shell(
            server.uri(),
            "import os",
            "try:",
            "    for i in range(1024): h.pwrite(os.urandom(1 << 20), i << 20)",
            "except nbd.Error as e: print(i, e.errnum)",
            "h.trim(8 << 20, 0)",
            "h.pwrite(b'y' * 4096, 0)",
            "print(h.pread(4096, 0) == b'y' * 4096)",
        ).split()
        assert int(told[0]) > 4
        assert told[1:] == [str(errno.ENOSPC), "True"]
        assert "Traceback" not in server.log.read_text()
        assert server.stop() == 0


def test_a_snapshot_is_served_read_only_and_shows_what_was(pool: Path, tmp_path: Path, run: Run) -> None:
    async def take() -> None:
        async with Pool.open(pool) as opened:
            await opened.volume("v").write(0, b"before" * 4096)
            await opened.take_snapshots([("v", "s")])
            await opened.volume("v").write(0, b"after!" * 4096)

    trio.run(take)
    with Nbdkit(tmp_path, f"pool={pool}", "volume=v@s") as server:
        (export,) = json.loads(run("nbdinfo", "--json", server.uri()))["exports"]
        assert export["is_read_only"]
        assert export["description"] == "32 MiB snapshot, read-only"
        with nbdclient.Connection(server.socket, "") as client:
            assert client.read(0, 12) == b"beforebefore"
            with pytest.raises(PermissionError):
                client.write(0, bytes(4096))
        assert server.stop() == 0


def test_under_dash_r_nothing_of_a_volume_is_written(pool: Path, tmp_path: Path) -> None:
    with (
        Nbdkit(tmp_path, f"pool={pool}", "volume=v", options=["-r"]) as server,
        nbdclient.Connection(server.socket, "") as client,
    ):
        with pytest.raises(PermissionError):
            client.write(0, b"x" * 4096)
        assert client.read(0, 4096) == bytes(4096)


# -- over nbdkit's own: --run, filters, TLS, the background ------------------------------------------------------------


def test_qemu_img_and_nbdcopy_under_run_keep_every_byte_and_leave_nothing_to_replay(pool: Path, tmp_path: Path) -> None:
    data = bytearray(random.Random(2).randbytes(32 * MIB))
    data[8 * MIB : 24 * MIB] = bytes(16 * MIB)
    (tmp_path / "in").write_bytes(data)
    arguments = ["pool=p", f"home={tmp_path}/home", "volume=v"]
    convert = f"qemu-img convert -n -f raw -O raw {tmp_path}/in $uri"
    result = once(*arguments, run=f"{convert} && nbdcopy $uri {tmp_path}/out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out").read_bytes() == data
    released(pool)
    assert inspect(pool) == {"replayed": 0, "problems": [], "volumes": ["p/v"]}
    assert once(*arguments, run="exit 7").returncode == 7


def released(pool: Path) -> None:
    """Wait until the server that `--run` left behind has closed the pool, as the documentation says."""
    subprocess.run(["flock", pool / "lock", "true"], check=True, timeout=30)


def test_a_filter_works_over_a_volume_and_cow_leaves_it_as_it_was(pool: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests"
    filters = ["--filter=log", "--filter=cow"]
    writing = "qemu-io -f raw -c 'write -P 7 0 64k' -c 'read -P 7 0 64k' $uri"
    result = once(f"pool={pool}", "volume=v", f"logfile={log}", options=filters, run=writing)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Write" in log.read_text()
    released(pool)
    reading = once(f"pool={pool}", "volume=v", run="qemu-io -f raw -c 'read -P 0 0 64k' $uri")
    assert "verification failed" not in reading.stdout
    assert reading.returncode == 0, reading.stdout + reading.stderr


def test_nbdkits_tls_lets_in_who_knows_the_key_and_nobody_else(pool: Path, tmp_path: Path, run: Run) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    with Nbdkit(tmp_path, f"pool={pool}", "volume=v", options=["--tls=require", f"--tls-psk={keys}"]) as server:
        secure = f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={keys}"
        assert run("nbdinfo", "--size", secure).strip() == str(32 * MIB)
        plain = subprocess.run(["nbdinfo", server.uri()], cwd=tmp_path, capture_output=True, check=False, timeout=30)
        assert plain.returncode != 0
        assert server.stop() == 0


def test_in_the_background_it_serves_and_ends_as_in_the_foreground(pool: Path, tmp_path: Path) -> None:
    pidfile, socket = tmp_path / "pid", tmp_path / "s"
    # A relative path: nbdkit leaves the directory.
    where = [f"pool=./{pool.relative_to(tmp_path)}", "volume=v"]
    subprocess.run(
        command(*where, options=["-P", pidfile, "-U", socket]), cwd=tmp_path, env=environment(), check=True, timeout=30
    )
    deadline_s = time.monotonic() + 20
    while not pidfile.exists() or not pidfile.read_text().strip():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    pid = int(pidfile.read_text())
    try:
        with nbdclient.Connection(socket, "") as client:
            client.write(0, b"z" * 4096)
            assert client.read(0, 4096) == b"z" * 4096
    finally:
        os.kill(pid, signal.SIGTERM)
    released(pool)
    assert inspect(pool)["replayed"] == 0


# -- its end -----------------------------------------------------------------------------------------------------------


def test_sigterm_under_load_leaves_a_pool_that_needs_no_recovery(pool: Path, tmp_path: Path) -> None:
    with Nbdkit(tmp_path, f"pool={pool}", "volume=v") as server:
        fio = ["fio", "--name=l", "--ioengine=nbd", f"--uri={server.uri()}", "--size=32M"]
        load = subprocess.Popen(
            [*fio, "--rw=randwrite", "--bs=4k", "--iodepth=32", "--time_based", "--runtime=60"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(0.5)
            assert server.stop() == 0
        finally:
            load.kill()
            load.wait()
    assert inspect(pool) == {"replayed": 0, "problems": [], "volumes": ["p/v"]}


def test_kill_9_loses_nothing_that_was_acknowledged(pool: Path, tmp_path: Path) -> None:
    written = random.Random(3)
    model = bytearray(32 * MIB)
    with (
        Nbdkit(tmp_path, f"pool={pool}", "volume=v") as server,
        contextlib.suppress(ConnectionError),  # the last word to a server that is dead
        nbdclient.Connection(server.socket, "") as client,
    ):
        for number in range(600):
            length = written.choice([512, 4096, 4096, 65536])
            offset = written.randrange(0, len(model) - length, 512)
            data = written.randbytes(length)
            client.write(offset, data)
            model[offset : offset + length] = data
            if number == 300:
                client.flush()
        server.kill()
    found = inspect(pool)
    assert found["replayed"] > 0
    assert found["problems"] == []
    with (
        Nbdkit(tmp_path, f"pool={pool}", "volume=v") as server,
        nbdclient.Connection(server.socket, "") as client,
    ):
        for at in range(0, len(model), 8 * MIB):
            assert client.read(at, 8 * MIB) == model[at : at + 8 * MIB]


def test_writes_verify_on_many_threads_while_checkpoints_and_the_cleaner_work(tmp_path: Path, run: Run) -> None:
    pool = make_pool(tmp_path / "home", volumes={"v": 40 * MIB}, fast_mib=64)
    config = tmp_path / "config.toml"
    config.write_text('[pool]\ncheckpoint_interval_s = 0.1\nunsynced_cap = "8M"\n')
    with Nbdkit(tmp_path, f"pool={pool}", "volume=v", f"config={config}") as server:
        common = ["fio", "--name=v", "--ioengine=nbd", f"--uri={server.uri()}", "--verify=crc32c", "--verify_fatal=1"]
        quarters = ["--numjobs=4", "--size=10M", "--offset_increment=10M", "--iodepth=16", "--norandommap"]
        mix = ["--rw=randrw", "--rwmixread=40", "--bssplit=4k/70:512/10:64k/20", "--io_size=30M", "--fsync=200"]
        run(*common, *quarters, *mix, "--verify_backlog=64")
        trimming = ["--rw=randtrimwrite", "--bs=16k", "--numjobs=2", "--size=20M", "--offset_increment=20M"]
        run("fio", "--name=t", "--ioengine=nbd", f"--uri={server.uri()}", *trimming, "--iodepth=8")
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    assert inspect(pool) == {"replayed": 0, "problems": [], "volumes": ["p/v"]}


# -- what it refuses ---------------------------------------------------------------------------------------------------


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that nbdkit ends with."""
    assert result.returncode == 1, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("nbdkit: error: ")
    return line


def test_a_pool_that_terraced_or_another_nbdkit_has_is_refused_and_untouched(pool: Path, tmp_path: Path) -> None:
    arguments = ["pool=p", f"home={tmp_path}/home", "volume=v"]
    # Nobody writes to it, and its checkpoint is hours away.
    with Daemon(tmp_path / "home", '[pool]\ncheckpoint_interval_s = 3600\n[scrub]\ninterval = "never"\n') as daemon:
        before = digests(tmp_path / "home")
        assert "is open in another process" in refusal(once(*arguments))
        assert digests(tmp_path / "home") == before
        assert daemon.stop() == 0
    config = tmp_path / "config.toml"
    config.write_text("[pool]\ncheckpoint_interval_s = 3600\n")
    with Nbdkit(tmp_path, *arguments, f"config={config}") as server:
        before = digests(tmp_path / "home")
        assert "is open in another process" in refusal(once(*arguments))
        assert digests(tmp_path / "home") == before
        assert server.stop() == 0


def test_what_isnt_there_is_named_in_one_line_and_the_pool_stays_as_it_is(pool: Path, tmp_path: Path) -> None:
    before = digests(tmp_path / "home")
    for arguments, words in (
        ([f"pool={pool}", "volume=nope"], "the pool p has no volume 'nope'; it has v"),
        (["pool=q", f"home={tmp_path}/home", "volume=v"], "there is no pool 'q' in "),
        ([f"pool={tmp_path}/q", "volume=v"], f"there is no pool in {tmp_path}/q"),
        ([f"pool={pool}", "vol=v"], "there is no parameter 'vol': pool=: "),
    ):
        assert words in refusal(once(*arguments)), arguments
    assert digests(tmp_path / "home") == before


def test_a_volume_that_only_the_log_knows_is_found(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "home", volumes={})
    with Daemon(tmp_path / "home", "[pool]\ncheckpoint_interval_s = 3600\n") as daemon:
        daemon.cli("volume", "create", "p/late", "4M")
    result = once(f"pool={pool}", "volume=late", run="nbdinfo --size $uri")
    assert result.stdout.strip() == str(4 * MIB), result.stderr


def test_a_missing_device_is_named_before_nbdkit_says_that_it_is_ready(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "p.img").rename(tmp_path / "elsewhere")
    socket = tmp_path / "s"
    result = subprocess.run(
        command(f"pool={pool}", "volume=v", options=["-U", socket]),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "p.img is missing: attach it again" in refusal(result)


def test_a_pool_that_cannot_be_opened_after_all_ends_the_command_of_run(pool: Path, tmp_path: Path) -> None:
    """Between the look at the pool and nbdkit's fork somebody else may take it: `--run` must not wait for ever."""
    spoiler = tmp_path / "spoiler.py"
    body = PLUGIN.read_text().replace("Path(__file__).resolve()", f"Path({str(PLUGIN)!r})")
    vanish = f"os.rename({str(pool)!r}, {str(pool) + '-gone'!r})"
    spoiler.write_text(f"{body}\n    look = get_ready\n\n    def get_ready():\n        look()\n        {vanish}\n")
    arguments = ["-U", "-", "python", str(spoiler), f"pool={pool}", "volume=v", "--run", "nbdinfo $uri"]
    result = subprocess.run(
        ["nbdkit", *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode != 0
    assert "there is no pool in" in result.stderr


def test_an_environment_of_another_build_of_python_on_the_path_does_not_lead_nbdkits_python_astray(pool: Path) -> None:
    """As where the environment that holds Terrace is activated: an embedded Python asks the PATH where it lies."""
    first = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    served = once(f"pool={pool}", "volume=v", run='nbdinfo --size "$uri"', env=environment() | first)
    assert served.returncode == 0, served.stderr
    assert int(served.stdout) > 0


def test_a_plugin_without_its_packages_says_what_to_do(tmp_path: Path) -> None:
    alone = tmp_path / "terrace" / "nbdkit_plugin.py"
    alone.parent.mkdir()
    shutil.copy(PLUGIN, alone)
    env = {name: value for name, value in environment().items() if name != "VIRTUAL_ENV"}  # of who runs the tests

    def line() -> str:
        arguments = ["nbdkit", "-U", "-", "python", str(alone), "pool=p", "--run", "true"]
        return refusal(
            subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path)
        )

    assert "there is no environment with Terrace's dependencies beside this plugin" in line()
    (tmp_path / ".venv" / "lib" / "python3.99" / "site-packages").mkdir(parents=True)
    assert "is of another version" in line()
    version = "python{}.{}".format(*sys.version_info[:2])
    (tmp_path / ".venv" / "lib" / version / "site-packages").mkdir(parents=True)
    assert "lacks trio, " in line()
