"""PostgreSQL on ext4 on a volume that this host has attached: is every snapshot a database, and is nothing lost?

    attach pg/data --mkfs ext4 --mount DIR   a server on it; pgbench and a ledger write for --seconds
    a snapshot each --interval seconds       each is cloned, attached, mounted: the server starts on it, which replays
                                             its WAL; pg_amcheck finds nothing; the sums of pgbench are equal; of the
                                             ledger all is there that was committed before the snapshot was asked for
    SIGKILL of server, keeper and terraced   everything starts again: no committed line is missing

The ledger is one session that inserts numbers, one transaction each, and notes here, outside of the volume, which of
them the server said were committed. Exit status 0: all of it held; 1: something did not, and the last lines say what.

Needs root (mount, and PostgreSQL runs as the user `postgres`), and Debian's postgresql and postgresql-contrib.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.system.daemon import Daemon, DaemonError

USER = "postgres"
VOLUME_BYTES = 1 << 30
STOP_S = 60.0
SUMS = (
    "select (select sum(abalance) from pgbench_accounts) = (select sum(tbalance) from pgbench_tellers) "
    "and (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches) "
    "and (select sum(bbalance) from pgbench_branches) = (select coalesce(sum(delta), 0) from pgbench_history)"
)


class PostgresError(Exception):
    """Something did not hold; the message names what."""


def main() -> int:
    parser = argparse.ArgumentParser(description="PostgreSQL on a volume: snapshots under load, a kill of everything.")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load before the kill (default %(default)g)")
    parser.add_argument("--interval", type=float, default=5.0, help="between snapshots (default %(default)g)")
    parser.add_argument("--scale", type=int, default=5, help="of pgbench, 16 MB each (default %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that all of it is taken down again
    if os.geteuid() != 0:
        sys.exit("error: this needs root, to mount filesystems and to become the user postgres")
    start_s = time.monotonic()
    try:
        directory = Path(tempfile.mkdtemp(prefix="pg-"))
        directory.chmod(0o755)  # the user postgres must get through
        run(directory, options)
        shutil.rmtree(directory)
    except (PostgresError, DaemonError) as error:
        print(f"FAIL: {error}", file=sys.stderr)
        print(f"What it left is in {directory}", file=sys.stderr)
        return 1
    print(f"PASS: PostgreSQL lost nothing, in {time.monotonic() - start_s:.0f} s")
    return 0


def run(directory: Path, options: argparse.Namespace) -> None:
    """All of it; raises PostgresError."""
    with Daemon(directory / "home") as daemon:
        daemon.cli("pool", "create", "pg", "--fast", f"{directory}/fast={4 * VOLUME_BYTES}")
        daemon.cli("volume", "create", "pg/data", str(VOLUME_BYTES))
        main_place = Place(daemon, "pg/data", directory / "data")
        try:
            main_place.attach("--mkfs", "ext4")
            cluster = Cluster(main_place.mountpoint / "cluster", directory / "main.log")
            cluster.make()
            cluster.start()
            cluster.tool("pgbench", "-q", "-i", "-s", str(options.scale), "bench")
            cluster.sql("create table ledger (n bigint primary key)")
            ledger = Ledger(cluster)
            load = cluster.begin("pgbench", "-n", "-c", "4", "-T", f"{options.seconds + 600:.0f}", "bench")
            snapshots: list[tuple[str, int]] = []
            end_s = time.monotonic() + options.seconds
            while time.monotonic() < end_s:
                time.sleep(options.interval)
                if load.poll() is not None:
                    raise PostgresError(f"pgbench ended by itself:\n{cluster.said()}")
                committed = ledger.committed
                name = f"s{len(snapshots)}"
                daemon.cli("snapshot", "create", f"pg/data@{name}")
                snapshots.append((name, committed))
                print(f"snapshot {name}: {committed} lines of the ledger are committed", flush=True)

            # Everything at once, as far as signals go: the server, the file system's keeper, the block store.
            cluster.kill()
            main_place.kill_keeper()
            daemon.kill()
            committed = ledger.end()
            load.wait(STOP_S)
            print(f"killed everything; {committed} lines are committed", flush=True)

            daemon.start()
            main_place.recover()
            cluster.start()
            cluster.check(committed, "after the kill of everything")
            cluster.stop()
            main_place.detach()
            for name, least in snapshots:
                check_snapshot(daemon, directory, name, least)
        finally:
            main_place.clear_away()


def check_snapshot(daemon: Daemon, directory: Path, name: str, least: int) -> None:
    """A snapshot's clone must be a database with all that was committed before it was taken."""
    clone = f"pg/clone-{name}"
    daemon.cli("volume", "clone", f"pg/data@{name}", clone)
    place = Place(daemon, clone, directory / f"clone-{name}")
    try:
        place.attach()
        cluster = Cluster(place.mountpoint / "cluster", directory / f"{name}.log")
        cluster.start()
        found = cluster.check(least, f"snapshot {name}")
        cluster.stop()
        place.detach()
        print(f"snapshot {name}: a sound database with {found} lines, {least} were committed before it", flush=True)
    finally:
        place.clear_away()
    daemon.cli("volume", "delete", clone, "--yes")


class Place:
    """A volume, attached and mounted."""

    def __init__(self, daemon: Daemon, name: str, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self._daemon = daemon
        self._name = name

    def attach(self, *options: str) -> None:
        self.mountpoint.mkdir(exist_ok=True)
        said = self._daemon.cli("attach", self._name, "--mount", str(self.mountpoint), *options, timeout_s=120)
        print(f"{self._name} is {said.stdout.strip()}, mounted on {self.mountpoint}", flush=True)

    def detach(self) -> None:
        self._daemon.cli("detach", self._name, "--unmount", timeout_s=120)

    def kill_keeper(self) -> None:
        for row in self._rows():
            if row["keeper"]:
                psutil.Process(row["keeper"]).kill()

    def recover(self) -> None:
        """What the operator does after a keeper was killed: clear away what it has left, and attach anew."""
        self._daemon.cli("detach", self._name, "--unmount", "--force", status=None, timeout_s=120)
        self.attach()

    def clear_away(self) -> None:
        """Leave nothing on this host, whatever has happened. Does nothing where all was taken down in order."""
        if self._daemon.alive() and self._rows():
            for process in psutil.process_iter(["cwd"]):
                if (process.info["cwd"] or "").startswith(f"{self.mountpoint}/"):  # PostgreSQL works in its data
                    process.kill()
            self._daemon.cli("detach", self._name, "--unmount", "--force", timeout_s=120)

    def _rows(self) -> list[dict[str, int]]:
        found = json.loads(self._daemon.cli("attach", "--list", "-o", "json").stdout)
        return [row for row in found if row["name"] == self._name]


class Cluster:
    """One PostgreSQL server on one data directory, reached through a socket in that directory's parent."""

    def __init__(self, data: Path, log: Path) -> None:
        self.data = data
        self.log = log
        self.socket = data.parent
        self.bin = server_programs()

    def make(self) -> None:
        self.data.parent.chmod(0o755)
        self.data.mkdir()
        own(self.data)
        own(self.socket)
        self._as_user(self.bin / "initdb", "-A", "trust", "--no-sync", "-D", self.data)
        self._as_user(self.bin / "initdb", "--sync-only", "-D", self.data)

    def start(self) -> None:
        self.log.touch()
        own(self.log)
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # of another life: a snapshot has the server's, too
        options = f"-c listen_addresses='' -c unix_socket_directories={self.socket} -c shared_buffers=64MB"
        self._as_user(self.bin / "pg_ctl", "start", "-w", "-t", "60", "-D", self.data, "-l", self.log, "-o", options)
        if self.sql("select count(*) from pg_database where datname = 'bench'", "postgres") == "0":
            self.sql("create database bench", "postgres")

    def stop(self) -> None:
        self._as_user(self.bin / "pg_ctl", "stop", "-w", "-m", "fast", "-D", self.data)

    def kill(self) -> None:
        """SIGKILL of the server and of all its processes."""
        server = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        for process in [server, *server.children(recursive=True)]:
            process.kill()
        psutil.wait_procs([server], timeout=STOP_S)

    def tool(self, name: str, *arguments: str) -> str:
        return self._as_user(self.bin / name, "-h", self.socket, "-U", USER, *arguments)

    def begin(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = ["runuser", "-u", USER, "--", str(self.bin / name), "-h", str(self.socket), "-U", USER, *arguments]
        with self.log.open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd="/")

    def sql(self, text: str, database: str = "bench") -> str:
        return self.tool("psql", "-qAt", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", text).strip()

    def said(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def check(self, committed: int, when: str) -> int:
        """Raises PostgresError if the database isn't sound or lacks committed lines; returns how many it has."""
        self.tool("pg_amcheck", "--install-missing", "--heapallindexed", "--parent-check", "-d", "bench")
        if self.sql(SUMS) != "t":
            raise PostgresError(f"{when}: the balances of pgbench don't add up")
        count, last = map(int, self.sql("select count(*), coalesce(max(n), 0) from ledger").split("|"))
        if count != last:
            raise PostgresError(f"{when}: the ledger ends with {last} and has only {count} lines")
        if last < committed:
            raise PostgresError(f"{when}: the ledger ends with {last}, and {committed} was committed")
        return last

    def _as_user(self, *command: str | Path) -> str:
        result = subprocess.run(
            ["runuser", "-u", USER, "--", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            timeout=180,
            check=False,
        )
        if result.returncode:
            raise PostgresError(f"{' '.join(map(str, command))}:\n{result.stdout[-3000:]}\n{self.said()}")
        return result.stdout


class Ledger:
    """A session that inserts 1, 2, 3 ... and knows up to which number the server has committed."""

    def __init__(self, cluster: Cluster) -> None:
        self.committed = 0
        command = ["runuser", "-u", USER, "--", str(cluster.bin / "psql"), "-h", str(cluster.socket), "-U", USER]
        self._session = subprocess.Popen(
            [*command, "-qAt", "-v", "ON_ERROR_STOP=1", "-d", "bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            cwd="/",
        )
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        assert self._session.stdin is not None and self._session.stdout is not None
        number = 0
        try:
            while True:
                number += 1
                self._session.stdin.write(f"insert into ledger values ({number});\n\\echo committed {number}\n")
                answer = self._session.stdout.readline()
                if not re.fullmatch(rf"committed {number}\n", answer):
                    return
                self.committed = number
        except (BrokenPipeError, ValueError):
            return

    def end(self) -> int:
        """After the server was killed: what it had committed."""
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            raise PostgresError("the session of the ledger doesn't notice that its server is gone")
        self._session.kill()
        self._session.wait()
        return self.committed


def own(path: Path) -> None:
    subprocess.run(["chown", f"{USER}:", str(path)], check=True)


def server_programs() -> Path:
    """Where the newest PostgreSQL's programs lie, which Debian keeps off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise PostgresError("PostgreSQL's server is not installed; run scripts/install-tools")
    return found[-1].parent


if __name__ == "__main__":
    sys.exit(main())
