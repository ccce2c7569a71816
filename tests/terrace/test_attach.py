"""Attachments without the kernel's NBD client: records, the choice of a driver, loop devices, filesystems, keepers."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from terrace.attach import filesystem, fuseloop, kernelnbd, links, loopdev
from terrace.attach.choose import Means, choose
from terrace.attach.driver import Attached, Order
from terrace.attach.keeper import keep
from terrace.attach.record import LOG_BYTES, AttachError, Record, Records, directory_of, identifier
from terrace.home import SYSTEM_HOME, Home
from tests.system.daemon import environment

MIB = 1 << 20


def record(name: str = "p/v", device: str = "/dev/nbd0") -> Record:
    return Record(name, "nbd", device, False, 1, None, 12.5, None, 7)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    found = Records(tmp_path / "attach")
    found.prepare()
    return found


# Records


def test_a_record_is_found_again_until_it_is_forgotten(records: Records) -> None:
    for name in ("p/v", "p/v@monday", "other/v"):
        records.store(record(name))
    assert records.find("p/v") == record()
    assert [one.name for one in records.all()] == ["other/v", "p/v", "p/v@monday"]
    records.forget("p/v")
    records.forget("p/v")
    assert records.find("p/v") is None
    assert records.find("p/v@monday") == record("p/v@monday")


def test_a_record_of_another_boot_tells_of_nothing(records: Records) -> None:
    records.store(record())
    (path,) = records.directory.glob("*.json")
    path.write_text(path.read_text().replace(json.loads(path.read_text())["boot"], "another"))
    assert records.find("p/v") is None
    assert records.all() == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no record of an attachment: remove it"),
        ('{"version": 2}', "of another version of Terrace: detach with the Terrace that wrote it"),
        ("[]", "of another version"),
        (None, "says nothing of 'device'"),
    ],
)
def test_a_record_that_makes_no_sense_is_named(records: Records, content: str | None, said: str) -> None:
    records.store(record())
    (path,) = records.directory.glob("*.json")
    if content is None:
        content = json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "device"})
    path.write_text(content)
    with pytest.raises(AttachError, match=said) as refusal:
        records.find("p/v")
    assert str(path) in str(refusal.value)


def test_no_name_leaves_the_directory(records: Records) -> None:
    records.store(record("../../etc/passwd"))
    (path,) = records.directory.iterdir()
    assert path.parent == records.directory


HOLDER = """
import sys, time
from pathlib import Path
from terrace.attach.record import Records
with Records(Path(sys.argv[1])).held("p/v"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(records: Records) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(records.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_keeper_is_known_by_its_lock_and_gone_with_its_process(
    records: Records, holder: subprocess.Popen[str]
) -> None:
    assert records.keeper("p/v") == holder.pid
    assert records.keeper("p/other") is None
    busy = pytest.raises(AttachError, match=f"is being attached or detached by process {holder.pid}")
    with busy as refusal, records.held("p/v"):
        pass
    assert refusal.value.errno == errno.EBUSY
    assert not records.wait_until_gone("p/v", 0.05)
    assert records.tell_keeper("p/v", signal.SIGKILL) == holder.pid
    assert records.wait_until_gone("p/v", 10)
    assert records.keeper("p/v") is None
    assert records.tell_keeper("p/v", signal.SIGKILL) is None
    with records.held("p/v"):
        assert records.keeper("p/v") == os.getpid()


def test_each_home_has_attachments_of_its_own(tmp_path: Path) -> None:
    system, other = Home(SYSTEM_HOME), Home(tmp_path)
    assert directory_of(system) == Path("/run/terrace/attach")
    assert directory_of(other) == tmp_path / "run" / "attach"
    assert identifier(system, "p/v") == "terrace:p/v"
    assert identifier(other, "p/v") == f"terrace:p/v of {tmp_path}"


# Which driver


@pytest.mark.parametrize(
    ("asked", "no_nbd", "no_fuse", "chosen"),
    [
        ("auto", None, None, "nbd"),
        ("auto", "no module", None, "fuse"),
        ("auto", None, "no /dev/fuse", "nbd"),
        ("nbd", None, "no /dev/fuse", "nbd"),
        ("fuse", None, None, "fuse"),
        ("fuse", "no module", None, "fuse"),
    ],
)
def test_the_kernels_client_comes_first(asked: str, no_nbd: str | None, no_fuse: str | None, chosen: str) -> None:
    assert choose(asked, Means(True, no_nbd, no_fuse)) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "means", "said"),
    [
        ("auto", Means(False, None, None), "run it as root"),
        ("nbd", Means(True, "no module", None), r"can't be used: no module; try --driver fuse"),
        ("fuse", Means(True, None, "no /dev/fuse"), r"can't be used: no /dev/fuse; try --driver nbd"),
        ("auto", Means(True, "no module", "no /dev/fuse"), r"\(no module\), nor .* \(no /dev/fuse\)"),
    ],
)
def test_what_is_missing_is_said(asked: str, means: Means, said: str) -> None:
    with pytest.raises(AttachError, match=said):
        choose(asked, means)  # type: ignore[arg-type]


# Loop devices and filesystems


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


@pytest.fixture
def device(image: Path) -> Iterator[str]:
    made = loopdev.make(image)
    try:
        yield made
    finally:
        filesystem.unmount_all(made)
        loopdev.clear(made)


def test_a_file_becomes_a_device_that_follows_its_size_and_gives_holes_back(image: Path) -> None:
    device = loopdev.make(image)
    try:
        assert loopdev.find_device(image) == device
        assert loopdev.backing_of(device) == str(image)
        assert filesystem.size_bytes_of(device) == 64 * MIB
        sysfs = Path("/sys/block") / Path(device).name
        assert (sysfs / "loop" / "dio").read_text() == "1\n"
        assert (sysfs / "queue" / "logical_block_size").read_text() == "512\n"
        os.truncate(image, 80 * MIB)
        loopdev.take_size(device)
        assert filesystem.size_bytes_of(device) == 80 * MIB
        with Path(device).open("r+b", buffering=0) as disk:
            disk.write(b"x" * MIB)
            os.fsync(disk.fileno())
        assert image.read_bytes()[:MIB] == b"x" * MIB
        before = image.stat().st_blocks
        subprocess.run(["blkdiscard", "-f", device], check=True, env=environment())
        assert image.stat().st_blocks < before
    finally:
        loopdev.clear(device)
    assert loopdev.find_device(image) is None
    loopdev.clear(device)  # it is none any more, and that is no error


def test_a_read_only_device_takes_no_writes(image: Path) -> None:
    device = loopdev.make(image, read_only=True)
    try:
        assert (Path("/sys/block") / Path(device).name / "ro").read_text() == "1\n"
        with pytest.raises(PermissionError), Path(device).open("r+b", buffering=0) as disk:
            disk.write(bytes(4096))
    finally:
        loopdev.clear(device)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=f"{tmp_path}/none, the file of a loop device, can't be opened"):
        loopdev.make(tmp_path / "none")


@pytest.mark.alone
def test_a_device_that_is_open_is_not_said_to_be_gone(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopdev, "CLEAR_PATIENCE_S", 0.1)
    device = loopdev.make(image)
    fd = os.open(device, os.O_RDONLY)
    try:
        with pytest.raises(AttachError, match="is still open"):
            loopdev.clear(device)
    finally:
        os.close(fd)
    while loopdev.backing_of(device) is not None:
        time.sleep(0.01)


def test_a_filesystem_is_made_once_and_then_only_by_force(device: str, tmp_path: Path) -> None:
    where = tmp_path / "mnt"
    where.mkdir()
    with pytest.raises(AttachError, match="carries no filesystem: --mkfs ext4"):
        filesystem.mount(device, where, read_only=False)
    filesystem.make(device, "ext4", force=False)
    with pytest.raises(AttachError, match=f"{device} carries ext4: leave out --mkfs"):
        filesystem.make(device, "ext4", force=False)
    assert filesystem.mount(device, where, read_only=False)
    assert not filesystem.mount(device, where, read_only=False)
    (where / "file").write_text("kept")
    with pytest.raises(AttachError, match="is mounted at"):
        filesystem.make(device, "ext4", force=True)
    with pytest.raises(AttachError, match=f"p/v \\({device}\\) is mounted at {where}: unmount it first"):
        filesystem.require_unused(device, "p/v")
    assert filesystem.users_of(device).mounts == [str(where)]
    with (where / "file").open(), pytest.raises(AttachError, match=f"fuser -vm {where}"):
        filesystem.unmount(str(where))
    assert filesystem.unmount_all(device) == [str(where)]
    filesystem.require_unused(device, "p/v")
    filesystem.make(device, "ext4", force=True)
    assert filesystem.mount(device, where, read_only=True)
    assert [path.name for path in where.iterdir()] == ["lost+found"]


@pytest.mark.parametrize("what", ["ext4", "swap", "dos partition table"])
def test_no_filesystem_is_made_over_what_is_there(device: str, what: str) -> None:
    tools = {"ext4": ["mkfs.ext4", "-q"], "swap": ["mkswap"]}
    if what in tools:
        subprocess.run([*tools[what], device], check=True, env=environment() | PATHS, capture_output=True)
    else:
        # One partition of 1,024 sectors from sector 64 on, in the first entry of a master boot record.
        entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (64).to_bytes(4, "little") + (1024).to_bytes(4, "little")
        with Path(device).open("r+b", buffering=0) as disk:
            disk.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    with pytest.raises(AttachError, match=f"carries {what}"):
        filesystem.make(device, "xfs", force=False)


PATHS = {"PATH": f"{environment()['PATH']}:/usr/sbin:/sbin"}


def test_a_mount_needs_a_directory_that_is_free(device: str, tmp_path: Path) -> None:
    filesystem.make(device, "ext4", force=False)
    with pytest.raises(AttachError, match=f"no directory: make it first \\(mkdir -p {tmp_path}/none\\)"):
        filesystem.mount(device, tmp_path / "none", read_only=False)
    with pytest.raises(AttachError, match="something else is mounted at /proc"):
        filesystem.mount(device, Path("/proc"), read_only=False)


def test_a_link_of_somebody_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "DIRECTORY", tmp_path / "terrace")
    monkeypatch.setattr(links, "UDEV", tmp_path / "none")
    link = links.make("p/v", "/dev/null")
    assert link == str(tmp_path / "terrace/p/v") and Path(link).readlink() == Path("/dev/null")
    (tmp_path / "null").mkdir()
    monkeypatch.setattr(links, "SYSFS", tmp_path)
    (tmp_path / "null/backend").write_text("terrace:p/v of /elsewhere\n")
    assert links.make("p/v", "/dev/zero") is None
    assert links.make("p/v", "/dev/null") == link
    (tmp_path / "null/backend").write_text("")  # it is detached, by a keeper that could not remove its link
    assert links.make("p/v", "/dev/zero") == link
    links.remove(link, "/dev/zero")
    assert links.make("p/v", "/dev/null") == link
    links.remove(link, "/dev/zero")
    assert Path(link).readlink() == Path("/dev/null")
    links.remove(link, "/dev/null")
    assert not (tmp_path / "terrace").exists()
    (tmp_path / "terrace/p").mkdir(parents=True)
    (tmp_path / "terrace/p/v").symlink_to("/dev/gone")
    assert links.make("p/v", "/dev/null") == link
    monkeypatch.setattr(links, "UDEV", tmp_path)
    monkeypatch.setattr(links, "RULES", [tmp_path])
    assert links.make("p/w", "/dev/null") is None


# The keeper, over a loop device on a plain file in the place of a volume


KEEPER = """
import logging, sys
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
import trio
from terrace.attach import filesystem, fuseloop, links
from terrace.attach.driver import Order
from terrace.attach.keeper import keep
from terrace.home import Home

logging.basicConfig(stream=sys.stderr, level=logging.INFO)
links.DIRECTORY = Path(sys.argv[1]) / "links"

class PlainFile:
    def __init__(self, path):
        self.path = path
        self.looked = trio.Event()
    @property
    def size_bytes(self):
        return self.path.stat().st_size
    def look_now(self):
        self.looked.set()
    async def wait_for_size(self, other_than):
        while self.size_bytes == other_than:
            await self.looked.wait()
            self.looked = trio.Event()
        return self.size_bytes

@asynccontextmanager
async def backing(order, place):
    assert place.is_dir()
    path = place / "file"
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(64 << 20)
    try:
        yield PlainFile(path)
    finally:
        path.unlink()

order = Order(home=Home(Path(sys.argv[1])), name="p/v", address=("127.0.0.1", 1))
prepare = (lambda device: filesystem.make(device, sys.argv[2], force=False)) if sys.argv[2:] else (lambda device: None)
ready = lambda device: print(device, flush=True)
trio.run(partial(keep, order, "fuse", fuseloop.driver(backing), ready=ready, prepare=prepare))
"""


class Keeper:
    def __init__(self, home: Path, *arguments: str) -> None:
        self.records = Records(home / "run" / "attach")
        self.file = home / "run/attach/fuse/p/v/file"
        self.process = subprocess.Popen(
            [sys.executable, "-c", KEEPER, str(home), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | PATHS,
        )
        assert self.process.stdout is not None
        self.device = self.process.stdout.readline().strip()

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> str:
        """What it has logged."""
        _, said = self.process.communicate(timeout=20)
        return said


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path)
    yield made
    made.process.kill()
    made.wait()
    if loopdev.find_device(made.file):
        filesystem.unmount_all(made.device)
        loopdev.clear(made.device)


@pytest.mark.alone
def test_a_keeper_makes_a_device_records_it_and_takes_it_away(keeper: Keeper) -> None:
    assert loopdev.backing_of(keeper.device) == str(keeper.file)
    found = keeper.records.find("p/v")
    assert found is not None and (found.driver, found.device) == ("fuse", keeper.device)
    assert found.link is not None and Path(found.link).readlink() == Path(keeper.device)
    assert keeper.records.keeper("p/v") == keeper.process.pid
    assert "p/v is detached" in keeper.end()
    assert keeper.process.returncode == 0
    assert loopdev.backing_of(keeper.device) is None
    assert keeper.records.find("p/v") is None
    assert not keeper.file.parent.exists() and not Path(found.link).is_symlink()


def test_a_keeper_takes_a_new_size_when_it_is_told_to_look(keeper: Keeper) -> None:
    os.truncate(keeper.file, 96 * MIB)
    assert keeper.records.tell_keeper("p/v", signal.SIGHUP)
    deadline_s = time.monotonic() + 5
    while filesystem.size_bytes_of(keeper.device) != 96 * MIB:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    keeper.end()


def test_a_keeper_waits_for_what_is_mounted_and_says_so(keeper: Keeper, tmp_path: Path) -> None:
    where = tmp_path / "mnt"
    where.mkdir()
    filesystem.make(keeper.device, "ext4", force=False)
    filesystem.mount(keeper.device, where, read_only=False)
    keeper.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert keeper.process.poll() is None
    filesystem.unmount(str(where))
    said = keeper.wait()
    assert keeper.process.returncode == 0
    assert f"p/v ({keeper.device}) is mounted at {where}" in said


def test_what_a_killed_keeper_left_is_cleared_by_the_next(keeper: Keeper, tmp_path: Path) -> None:
    keeper.end(signal.SIGKILL)
    assert loopdev.backing_of(keeper.device) == str(keeper.file)
    assert keeper.records.keeper("p/v") is None
    second = Keeper(tmp_path)
    assert second.device
    assert len([one for one in keeper.records.all() if one.name == "p/v"]) == 1
    second.end()
    assert loopdev.find_device(keeper.file) is None


def test_nothing_is_left_where_the_filesystem_cannot_be_made(tmp_path: Path) -> None:
    failing = Keeper(tmp_path, "none")
    assert failing.device == ""
    assert "KeyError: 'none'" in failing.wait()
    assert loopdev.find_device(failing.file) is None
    assert not failing.file.parent.exists()


# Devices whose numbers others use again, and what uses a device without claiming it


@pytest.mark.alone
def test_a_keeper_leaves_the_device_alone_that_has_taken_its_number(keeper: Keeper, tmp_path: Path) -> None:
    fd = os.open(keeper.device, os.O_RDONLY)
    loopdev_ended_by_somebody(fd)
    other = tmp_path / "other"
    with other.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["losetup", keeper.device, str(other)], check=True, env=environment() | PATHS)
    try:
        filesystem.make(keeper.device, "ext4", force=False)
        where = tmp_path / "mnt"
        where.mkdir()
        filesystem.mount(keeper.device, where, read_only=False)
        keeper.end()  # it doesn't wait for what is mounted there either
        assert loopdev.backing_of(keeper.device) == str(other)
        # Nor shall it go when it is unmounted.
        assert (Path("/sys/block") / Path(keeper.device).name / "loop/autoclear").read_text() == "0\n"
    finally:
        filesystem.unmount_all(keeper.device)
        loopdev.clear(keeper.device, inside=tmp_path)


def loopdev_ended_by_somebody(fd: int) -> None:
    """As `losetup -d` does."""
    fcntl.ioctl(fd, loopdev.LOOP_CLR_FD)
    os.close(fd)


@pytest.mark.parametrize("backend", ["terrace:p/w", "terrace:p/v of /elsewhere", None])
def test_a_device_of_the_kernels_client_that_is_anothers_by_now_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    home = Home(tmp_path)
    order = Order(home, "p/v", ("127.0.0.1", 1))
    monkeypatch.setattr(kernelnbd, "SYSFS", tmp_path)
    (tmp_path / "nbd0").mkdir()
    (tmp_path / "nbd0/pid").write_text("1\n")
    if backend is not None:
        (tmp_path / "nbd0/backend").write_text(f"{backend}\n")
    kept = Records(directory_of(home))
    kept.prepare()
    kept.store(record())
    assert kernelnbd.find_left_device(order) is None
    (tmp_path / "nbd0/backend").write_text(f"{order.identifier}\n")
    assert kernelnbd.find_left_device(order) == 0


def test_a_link_to_the_device_of_a_volume_whose_name_begins_alike_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "DIRECTORY", tmp_path / "terrace")
    monkeypatch.setattr(links, "UDEV", tmp_path / "none")
    monkeypatch.setattr(links, "SYSFS", tmp_path)
    links.make("p/v", "/dev/null")
    (tmp_path / "null").mkdir()
    (tmp_path / "null/backend").write_text("terrace:p/v2\n")
    link = links.make("p/v", "/dev/zero")
    assert link is not None and Path(link).readlink() == Path("/dev/zero")


def test_a_device_that_is_open_or_below_a_loop_device_is_in_use(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "OPENER_PATIENCE_S", 0.1)
    with Path(device).open("rb") as disk, subprocess.Popen(["sleep", "60"], stdin=disk) as opener:
        try:
            with pytest.raises(AttachError, match=f"is open in sleep \\(process {opener.pid}\\)"):
                filesystem.require_unused(device, "p/v")
        finally:
            opener.kill()
    filesystem.require_unused(device, "p/v")
    upper = loopdev.make(Path(device))
    try:
        with pytest.raises(AttachError, match=f"in use by {Path(upper).name}: "):
            filesystem.require_unused(device, "p/v")
    finally:
        loopdev.clear(upper)


def test_no_filesystem_is_made_over_data_that_nobody_knows(device: str) -> None:
    with Path(device).open("r+b", buffering=0) as disk:
        disk.seek(512 << 10)
        disk.write(b"x" * 4096)
    with pytest.raises(AttachError, match=f"{device} carries data of an unknown kind: say --force"):
        filesystem.make(device, "ext4", force=False)
    filesystem.make(device, "ext4", force=True)


def test_only_a_record_of_the_keeper_that_lives_tells_of_a_device(
    records: Records, holder: subprocess.Popen[str]
) -> None:
    records.store(record())  # by a keeper that was killed; the next one has just taken the lock
    assert records.attached("p/v") is None
    records.store(dataclasses.replace(record(), keeper=holder.pid))
    assert records.attached("p/v") is not None
    holder.kill()
    holder.wait()
    assert records.attached("p/v") is None


def test_a_directory_that_others_can_change_takes_no_records(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    with pytest.raises(AttachError, match=f"{home} can be changed by others than you \\(owner 12345"):
        Records(directory_of(Home(home))).prepare()


def test_a_log_does_not_grow_for_ever(records: Records) -> None:
    handler = records.log_handler("p/v")
    line = logging.LogRecord("terrace.attach", logging.INFO, "", 0, "x" * 1000, None, None)
    for _ in range(4 * LOG_BYTES // 1000):
        handler.emit(line)
    handler.close()
    assert LOG_BYTES < sum(path.stat().st_size for path in records.directory.glob("*.log*")) <= 2 * LOG_BYTES
    assert records.all() == []


# The keeper, over a device that outlives it


@asynccontextmanager
async def outliving(device: str, seen: list[Attached], order: Order) -> AsyncIterator[Attached]:
    found = Attached(device, lambda: True, outlives=True)
    seen.append(found)
    yield found


@pytest.mark.parametrize("used", [True, False])
def test_a_keeper_that_fails_leaves_what_is_mounted_to_the_next(device: str, tmp_path: Path, used: bool) -> None:
    order = Order(Home(tmp_path), "p/v", ("127.0.0.1", 1))
    seen: list[Attached] = []
    if used:
        (tmp_path / "mnt").mkdir()
        filesystem.make(device, "ext4", force=False)
        filesystem.mount(device, tmp_path / "mnt", read_only=False)

    def fail(device: str) -> None:
        raise AttachError(errno.EEXIST, "it can't be")

    run = partial(keep, order, "nbd", partial(outliving, device, seen), ready=print, prepare=fail)
    with pytest.raises(AttachError, match="it can't be"):
        trio.run(run)
    assert [found.leave for found in seen] == [used]
    assert (Records(order.directory).find("p/v") is not None) == used


def test_nobody_is_told_of_a_device_that_is_going(device: str, tmp_path: Path) -> None:
    order = Order(Home(tmp_path), "p/v", ("127.0.0.1", 1))
    told: list[Record | None] = []

    @asynccontextmanager
    async def going(order: Order) -> AsyncIterator[Attached]:
        yield Attached(device, lambda: True, outlives=True)
        told.append(Records(order.directory).attached("p/v"))

    def ready(device: str) -> None:
        told.append(Records(order.directory).attached("p/v"))
        signal.raise_signal(signal.SIGTERM)

    trio.run(partial(keep, order, "nbd", going, ready=ready))
    assert told[0] is not None and told[1] is None


def test_a_home_behind_a_link_and_with_a_space_has_its_leftovers_cleared(tmp_path: Path) -> None:
    real, home = tmp_path / "the home", tmp_path / "home"
    real.mkdir()
    home.symlink_to(real)
    first = Keeper(home)
    first.end(signal.SIGKILL)
    assert loopdev.backing_of(first.device) == str(real / "run/attach/fuse/p/v/file")
    loopdev.clear(first.device, inside=real)
    # As of a FUSE mount that nobody serves any more, with somebody still in it.
    place = fuseloop.mount_point(Home(home), "p/v")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True, env=environment() | PATHS)
    try:
        with subprocess.Popen(["sleep", "60"], cwd=place) as inside:
            fuseloop.clear_left_over(Home(home), "p/v")
            inside.kill()
        assert str(place) not in filesystem.mount_points()
    finally:
        subprocess.run(["umount", str(place)], check=False, env=environment() | PATHS, capture_output=True)
    second = Keeper(home)
    second.end(signal.SIGKILL)
    try:
        assert fuseloop.find_device(Home(home), "p/v") == second.device
        fuseloop.clear_left_over(Home(home), "p/v")
        assert fuseloop.find_device(Home(home), "p/v") is None
    finally:
        loopdev.clear(second.device, inside=real)
