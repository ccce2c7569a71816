"""terraced under a real systemd: boots, is restarted, watched, stopped, and can do its work in its sandbox.

One machine for all; each test leaves the daemon running.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from terrace.config import parse_config
from terrace.unitfiles import Installation, render
from tests.system.booted import BIN, Machine, require_in_order
from tests.system.nbdclient import Connection

pytestmark = pytest.mark.system

MIB = 1 << 20
PATTERN = bytes(range(256)) * 16
NBD = "/var/lib/terrace/nbd.sock"
SOCKET_UNIT = "/etc/systemd/system/terraced.socket"
UNITS = ("terraced.service", "terraced.socket")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A block device of 64 MiB."""
    file = tmp_path_factory.mktemp("loop") / "file"
    with file.open("wb") as made:
        made.truncate(64 * MIB)
    device = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=True)
    yield Path(device.stdout.strip())
    subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, loop: Path) -> Iterator[Machine]:
    """With the units installed and the daemon running, a pool `p` on a block device and a volume `p/v`."""
    with Machine(tmp_path_factory.mktemp("systemd") / "machine", [loop]) as booted:
        booted.terrace("install-units")
        booted.run("systemctl", "daemon-reload")
        booted.run("udevadm", "control", "--reload")
        booted.run("systemctl", "enable", "--now", *UNITS)
        booted.terrace("pool", "create", "p", "--fast", str(loop))
        booted.terrace("volume", "create", "p/v", "16M")
        booted.path("/etc/terrace").mkdir()
        with Connection(booted.path(NBD), "p/v") as client:
            client.write(0, PATTERN)
        yield booted


def drop_in(machine: Machine, unit: str, text: str, name: str = "test") -> None:
    directory = machine.path(f"/etc/systemd/system/{unit}.d")
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.conf").write_text(text)
    machine.run("systemctl", "daemon-reload")


def served(machine: Machine) -> bytes:
    """What the volume's first block reads as; waits as long as the socket accepts."""
    with Connection(machine.path(NBD), "p/v") as client:
        return client.read(0, len(PATTERN))


def test_systemd_finds_nothing_wrong_with_the_units(machine: Machine) -> None:
    assert machine.run("systemd-analyze", "verify", *UNITS, "terrace-attach@demo-vol.service") == ""


def test_the_daemon_is_exposed_to_little(machine: Machine) -> None:
    """Threshold 20 is an exposure of 2.0, on a scale to 10; an unhardened service has 9.6."""
    machine.run("systemd-analyze", "security", "--threshold=20", "--no-pager", "terraced.service")


def test_it_is_ready_when_systemctl_returns_and_says_what_it_serves(machine: Machine) -> None:
    assert machine.show("terraced.service", "ActiveState") == "active"
    with Connection(machine.path(NBD), "p/v") as client:
        assert client.read(0, len(PATTERN)) == PATTERN
        machine.wait(
            lambda: machine.show("terraced.service", "StatusText") == "serving 1 pool, 1 volume, 1 client", timeout_s=10
        )


def test_its_sandbox_is_closed_and_it_has_two_capabilities(machine: Machine) -> None:
    status = Path(f"/proc/{machine.main_pid()}/status").read_text()
    found = dict(re.findall(r"^(NoNewPrivs|Seccomp|CapEff|VmLck):\s*(\w+)", status, re.MULTILINE))
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    here = int(re.findall(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
    assert int(found["CapEff"], 16) == (1 << 14 | 1 << 24) & here
    assert int(found["VmLck"]) > 0
    assert "pool p is open" in machine.journal()  # on a block device, that is
    said = machine.terrace("pool", "create", "q", "--fast", "/srv/file=64M", status=1)
    assert "ReadWritePaths=" in said and said.count("\n") == 1, said


def test_a_directory_that_a_drop_in_allows_may_hold_devices(machine: Machine) -> None:
    drop_in(machine, "terraced.service", "[Service]\nReadWritePaths=/srv\n", "srv")
    machine.run("systemctl", "restart", "terraced.service")
    machine.terrace("pool", "create", "q", "--fast", "/srv/file=64M")
    machine.terrace("pool", "delete", "q", "--yes")


@pytest.mark.parametrize("activated", [True, False], ids=["terraced.socket", "descriptor store"])
def test_a_client_that_connects_while_the_daemon_is_restarted_waits_and_is_served(
    machine: Machine, activated: bool
) -> None:
    """With the socket unit, and without it, where systemd only stores what the daemon has bound."""
    if not activated:
        machine.run("systemctl", "stop", *UNITS)
        machine.path(SOCKET_UNIT).rename(machine.path(f"{SOCKET_UNIT}.away"))
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "terraced.service")
        machine.wait(lambda: machine.show("terraced.service", "NFileDescriptorStore") == "3")
    assert machine.show("terraced.socket", "ActiveState") == ("active" if activated else "inactive")
    before = machine.main_pid()
    restarts = int(machine.show("terraced.service", "NRestarts"))
    machine.kill(signal.SIGKILL)
    # Connects at once, long before the next one runs.
    assert served(machine) == PATTERN
    assert int(machine.show("terraced.service", "NRestarts")) == restarts + 1
    killed, before = before, machine.main_pid()
    assert killed != before

    # And in an orderly restart, over its whole length.
    refused: list[OSError] = []
    over = threading.Event()

    def connect_again_and_again() -> None:
        while not over.wait(0.02):
            try:
                served(machine)
            except ConnectionResetError:
                pass  # accepted by the one that was about to end
            except OSError as error:
                refused.append(error)

    client = threading.Thread(target=connect_again_and_again)
    client.start()
    machine.run("systemctl", "restart", "terraced.service")
    over.set()
    client.join()
    assert not [error for error in refused if isinstance(error, ConnectionRefusedError | FileNotFoundError)]
    assert machine.main_pid() != before
    if not activated:
        machine.run("systemctl", "stop", "terraced.service")
        machine.path(f"{SOCKET_UNIT}.away").rename(machine.path(SOCKET_UNIT))
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", *UNITS)


def test_a_daemon_that_hangs_is_replaced_and_the_journal_says_where_it_hung(machine: Machine) -> None:
    drop_in(machine, "terraced.service", "[Service]\nWatchdogSec=2s\n", "watchdog")
    machine.run("systemctl", "restart", "terraced.service")
    time.sleep(2.5)
    assert machine.show("terraced.service", "ActiveState") == "active", "it didn't say that it lives"
    before = machine.main_pid()
    machine.kill(signal.SIGSTOP)
    assert served(machine) == PATTERN
    assert machine.main_pid() != before
    said = machine.journal()
    assert "Watchdog timeout" in said and "most recent call first" in said
    drop_in(machine, "terraced.service", "", "watchdog")  # the others may be slower than that on a busy host
    machine.run("systemctl", "restart", "terraced.service")


def test_a_reload_hands_over_to_a_new_process_with_the_configuration_as_it_is_then(machine: Machine) -> None:
    file = machine.path("/etc/terrace/terraced.toml")
    file.write_text('[policy.one]\nplacement = "fast"\n')
    said = machine.terrace("install-units")
    assert "--config /etc/terrace/terraced.toml" in said and said.endswith("systemctl restart terraced.service\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "terraced.service")
    restarts = machine.show("terraced.service", "NRestarts")
    with Connection(machine.path(NBD), "p/v") as client:
        client.write(MIB, PATTERN)
        first = machine.main_pid()
        file.write_text('[policy.two]\nplacement = "fast"\n')
        machine.run("systemctl", "reload", "terraced.service")
        second = machine.main_pid()
        assert second != first
        assert "two" in machine.terrace("policy", "list")
        assert client.read(MIB, len(PATTERN)) == PATTERN

        machine.kill(signal.SIGHUP)
        machine.wait(lambda: machine.main_pid() not in (0, second))
        machine.wait(lambda: machine.show("terraced.service", "ActiveState") == "active")
        third = machine.main_pid()
        assert client.read(MIB, len(PATTERN)) == PATTERN

        file.write_text("[policy.two]\nplacement = 1\n")
        machine.run("systemctl", "reload", "terraced.service", status=1)
        machine.wait(lambda: machine.show("terraced.service", "ActiveState") == "active")
        assert machine.main_pid() == third
        assert "two" in machine.terrace("policy", "list")
        assert client.read(MIB, len(PATTERN)) == PATTERN
    file.write_text("")
    assert machine.show("terraced.service", "NRestarts") == restarts
    # systemd watches over the last of them as it did over the first.
    machine.kill(signal.SIGKILL)
    assert served(machine) == PATTERN
    assert int(machine.show("terraced.service", "NRestarts")) == int(restarts) + 1


def test_clients_stay_connected_over_a_restart_and_a_stop_disconnects_them(machine: Machine) -> None:
    idle = [Connection(machine.path(NBD), "p/v") for _ in range(200)]
    try:
        with Connection(machine.path(NBD), "p/v") as client:
            for round_number in range(3):
                client.write(2 * MIB, PATTERN + bytes([round_number]))
                before = machine.main_pid()
                machine.run("systemctl", "restart", "terraced.service")
                assert machine.main_pid() != before
                assert client.read(2 * MIB, len(PATTERN) + 1) == PATTERN + bytes([round_number])
                # Nobody but the daemon has them now, so its death is noticed.
                machine.wait(lambda: int(machine.show("terraced.service", "NFileDescriptorStore")) <= 3)
            assert all(one.read(2 * MIB, len(PATTERN)) == PATTERN for one in idle)
            machine.kill(signal.SIGKILL)
            with pytest.raises((ConnectionError, EOFError)):
                client.read(0, 1)
        machine.wait(lambda: machine.show("terraced.service", "ActiveState") == "active")
        with Connection(machine.path(NBD), "p/v") as client:
            machine.run("systemctl", "stop", *UNITS)
            with pytest.raises((ConnectionError, EOFError)):
                client.read(0, 1)
    finally:
        for one in idle:
            one.socket.close()
        machine.run("systemctl", "start", *UNITS)


def test_an_address_of_the_socket_unit_that_is_not_configured_is_refused_by_name(machine: Machine) -> None:
    drop_in(machine, "terraced.socket", "[Socket]\nListenStream=127.0.0.1:10810\n")
    machine.run("systemctl", "stop", *UNITS)
    machine.run("systemctl", "start", "terraced.socket")
    machine.run("systemctl", "start", "terraced.service", status=1)
    said = machine.journal()
    assert "terraced.socket listens on 127.0.0.1:10810, which is not configured" in said
    machine.run("systemctl", "stop", *UNITS)
    drop_in(machine, "terraced.socket", "")
    machine.run("systemctl", "start", *UNITS)


def test_addresses_that_change_are_served_after_what_install_units_says_to_do(machine: Machine) -> None:
    machine.path("/etc/terrace/terraced.toml").write_text('nbd.listen = ["127.0.0.1:10811", "localhost:10812"]\n')
    *_, said = machine.terrace("install-units").split("Next:\n")
    assert "systemctl stop" in said
    machine.run("sh", "-ec", said)
    served_on = machine.terrace("status")
    assert "127.0.0.1:10811" in served_on and "127.0.0.1:10812" in served_on and "10809" not in served_on
    assert "127.0.0.1:10811" in machine.show("terraced.socket", "Listen")
    # One that systemd can't know is bound by the daemon, and left with systemd for the next one.
    machine.wait(lambda: machine.show("terraced.service", "NFileDescriptorStore") == "1")


def test_a_stop_closes_the_pools_and_leaves_no_socket(machine: Machine) -> None:
    with Connection(machine.path(NBD), "p/v") as client:
        client.write(MIB, PATTERN)
        machine.run("systemctl", "stop", *UNITS)
    assert machine.show("terraced.service", "Result") == "success"
    assert machine.journal().index("pool p is closed") < machine.journal().rindex("stopped")
    assert not list(machine.path("/var/lib/terrace").glob("*.sock"))
    assert machine.show("terraced.service", "MainPID") == "0"
    machine.run("systemctl", "start", *UNITS)
    with Connection(machine.path(NBD), "p/v") as client:
        assert client.read(MIB, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("volume", ["demo/vol", "my-pool/my-vol", "p/a_b.c-d"])
def test_the_name_of_an_attach_unit_gives_back_the_volume_s_name(machine: Machine, volume: str) -> None:
    unit = machine.run("systemd-escape", "--template=terrace-attach@.service", volume).strip()
    started = machine.show(unit, "ExecStart")
    assert f"argv[]={BIN}/terrace attach --foreground {volume} ;" in started


def test_udev_names_a_loop_device_over_a_mounted_volume_as_long_as_it_is_there(machine: Machine) -> None:
    file = "/run/terrace/attach/fuse/my-pool/vol.1/data"
    machine.path(file).parent.mkdir(parents=True)
    machine.path(file).write_bytes(bytes(MIB))
    device = machine.run("losetup", "--find", "--show", file).strip()
    try:
        link = machine.path("/dev/terrace/my-pool/vol.1")
        machine.wait(link.is_symlink, 10)
        assert machine.run("readlink", "-f", "/dev/terrace/my-pool/vol.1").strip() == device
        unit = machine.run("systemd-escape", "--path", "--suffix=device", "/dev/terrace/my-pool/vol.1").strip()
        machine.wait(lambda: machine.show(unit, "ActiveState") == "active", 10)
    finally:
        machine.run("losetup", "--detach", device)
    machine.wait(lambda: not link.is_symlink(), 10)
    machine.wait(lambda: machine.show(unit, "ActiveState") == "inactive", 10)


def test_systemd_reads_paths_as_they_are_meant(machine: Machine) -> None:
    home = Path('/srv/100% "my" disks/$HOME')
    files = render(Installation(Path("/opt/a b/bin"), home, None, parse_config("", "none")))
    for kind in ("service", "socket"):
        machine.path(f"/run/systemd/system/odd.{kind}").write_text(files[f"terraced.{kind}"])
    machine.run("systemctl", "daemon-reload")
    shown = machine.run("systemctl", "show", "odd.service", "odd.socket").replace("\\$", "$")
    found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    started = f"path=/opt/a b/bin/terraced ; argv[]=/opt/a b/bin/terraced --home {home}".replace("$", "$$")
    assert started in found["ExecStart"]
    assert str(home) in shlex.split(found["RequiresMountsFor"])
    assert f"TMPDIR={home}" in shlex.split(found["Environment"])
    assert shlex.split(found["ReadWritePaths"]) == [str(home)]
    assert f"Listen={home}/nbd.sock (Stream)" in shown.replace('\\"', '"')


REQUIRES = "x-systemd.requires=terrace-attach@"
LOCAL = (
    "/dev/vda1 / ext4 defaults 0 1",
    "/dev/vda2 /var ext4 defaults 0 2",
    f"/dev/terrace/demo/vol /srv/data ext4 defaults,{REQUIRES}demo-vol.service 0 2",
    rf"/dev/terrace/my-pool/vol /srv/b ext4 nofail,{REQUIRES}my\x2dpool-vol.service 0 2",
)
"""As on the operating page, on a host whose /var, where the daemon's home is, is a filesystem of its own."""
NETWORK = tuple(line.replace(REQUIRES, f"_netdev,{REQUIRES}") for line in LOCAL)
"""With the pool's own devices behind the network."""


@pytest.mark.parametrize(("fstab", "target"), [(LOCAL, "local-fs"), (NETWORK, "remote-fs")], ids=["local", "network"])
def test_lines_of_fstab_give_mounts_that_come_after_the_attachment_and_go_before_it(
    machine: Machine, fstab: tuple[str, ...], target: str
) -> None:
    units = machine.path("/tmp/units")
    shutil.rmtree(units, ignore_errors=True)
    (units / "terraced.service.d").mkdir(parents=True)
    machine.path("/tmp/fstab").write_text("\n".join(fstab) + "\n")
    # In a container the generator would pass over devices.
    outside = (
        "env",
        "-u",
        "container",
        "SYSTEMD_FSTAB=/tmp/fstab",
        "SYSTEMD_IN_INITRD=0",
        "SYSTEMD_VIRTUALIZATION=vm:kvm",
    )
    machine.run(*outside, "/lib/systemd/system-generators/systemd-fstab-generator", *["/tmp/units"] * 3)
    for place, unit in (("data", "terrace-attach@demo-vol.service"), ("b", r"terrace-attach@my\x2dpool-vol.service")):
        made = (units / f"srv-{place}.mount").read_text().splitlines()
        assert f"Requires={unit}" in made
        assert f"After={unit}" in made
    assert (units / f"{target}.target.requires" / "srv-data.mount").is_symlink()
    if target == "remote-fs":
        needs = "[Unit]\nWants=network-online.target\nAfter=network-online.target remote-fs-pre.target\n"
        (units / "terraced.service.d" / "network.conf").write_text(needs)
        brings = "[Unit]\nBefore=network-online.target\n[Service]\nExecStart=/bin/true\n"
        (units / "network.service").write_text(brings)
        (units / "network-online.target.wants").mkdir()
        (units / "network-online.target.wants" / "network.service").symlink_to("../network.service")
    # No ordering cycle: filesystems before services, the daemon before its volumes, its own filesystem before it.
    verify = ("env", "SYSTEMD_UNIT_PATH=/tmp/units:", "systemd-analyze", "verify")
    assert "cycle" not in (said := machine.run(*verify, "multi-user.target", status=None)), said
    assert not re.search("cycle|terrace", said := machine.run(*verify, "srv-data.mount", status=None)), said


def test_a_host_that_goes_down_closes_the_pools_and_then_the_addresses(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine:
        machine.terrace("install-units")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "terraced.service")
        machine.terrace("pool", "create", "p", "--fast", "/var/lib/terrace/file=64M")
        said = machine.power_off()
    steps = (
        "terrace.pools: pool p is closed",
        "Stopped terraced.service",
        "Closed terraced.socket",
        "System Power Off",
    )
    require_in_order(said, steps)
