"""`terrace attach` and `terrace detach`: volumes as block devices of this host. The work is in `terrace.attach`."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from terrace.cli.context import VERSION, Context, pass_context
from terrace.cli.mirrorbrief import served_elsewhere
from terrace.cli.output import duration, output_option, patience, show_json, show_table
from terrace.sizes import format_size

if TYPE_CHECKING:
    from nbd.client import Address
    from terrace.attach.choose import Asked
    from terrace.attach.driver import Driver
    from terrace.attach.filesystem import Kind
    from terrace.attach.record import Record, Records

_START_PATIENCE_S = 60.0
"""What a keeper in the background gets to say how it went; the handshake alone may take 10 s a connection."""
_STOP_PATIENCE_S = 30.0


class _Duration(click.ParamType[int]):
    """`30min`, `12h`, `7d`; whole seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from terrace.schema import interval_seconds

        if isinstance(value, int):
            return value
        try:
            seconds = interval_seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds is None or seconds < 1:
            self.fail(f'{value!r} is not possible: write at least "1s"', param, ctx)
        return round(seconds)


@click.command()
@click.argument("name", type=VERSION, metavar="[POOL/VOL[@SNAP]]", required=False)
@click.option("--list", "listing", is_flag=True, help="Show what is attached on this host.")
@click.option("--mkfs", type=click.Choice(["ext4", "xfs"]), help="Make a filesystem, if there is nothing on it yet.")
@click.option("--mount", "mount_at", metavar="DIR", type=click.Path(), help="And mount it there.")
@click.option("--force", is_flag=True, help="With --mkfs: OVERWRITE what is there.")
@click.option("--read-only", is_flag=True, help="Nobody writes through this device. Snapshots are read-only anyway.")
@click.option(
    "--driver",
    type=click.Choice(["auto", "nbd", "fuse"]),
    default="auto",
    show_default=True,
    help="The kernel's NBD client, or FUSE and a loop device.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Of the kernel's NBD client. With several, I/O that takes over 5 s is begun anew.",
)
@click.option(
    "--dead-timeout",
    type=_Duration(),
    default="30d",
    show_default=True,
    help="How long I/O waits for a daemon that is gone before it fails.",
)
@click.option("--foreground", is_flag=True, help="Stay, until SIGTERM or Ctrl-C detaches: for systemd.")
@click.option("--report-to", type=int, hidden=True)
@output_option
@pass_context
def attach(
    context: Context,
    name: tuple[str, str, str | None] | None,
    listing: bool,
    mkfs: Kind | None,
    mount_at: str | None,
    force: bool,
    read_only: bool,
    driver: Asked,
    connections: int,
    dead_timeout: int,
    foreground: bool,
    report_to: int | None,
    output: str,
) -> None:
    """Make a volume or snapshot a block device of this host, and print its path.

    It stays when the daemon is restarted: what is asked of it meanwhile waits. What is attached already is told, and
    left as it is.
    """
    if listing:
        if name is not None or mkfs or mount_at:
            raise click.UsageError("--list shows what is attached, and attaches nothing")
        _show_all(context, output)
        return
    if name is None:
        raise click.UsageError("what shall be attached? Name a volume or snapshot, or say --list")
    if force and not mkfs:
        raise click.UsageError("--force is for --mkfs, which overwrites what is there")
    if mkfs and (read_only or name[2] is not None):
        raise click.UsageError("no filesystem can be made on what is read-only")
    if foreground:
        _stay(context, name, mkfs, mount_at, force, read_only, driver, connections, dead_timeout, report_to, output)
        return
    called = _called(name)
    records = _records(context)
    arguments = [
        *(["--read-only"] if read_only else []),
        *("--driver", driver, "--connections", str(connections), "--dead-timeout", f"{dead_timeout}s"),
    ]
    device, made = _attach(context, records, called, arguments)
    if not made:
        _require_as_asked(cast("Record", records.find(called)), read_only, driver)
    try:
        record = records.find(called)
        if mkfs:
            _make_filesystem(device, mkfs, force)
        if mount_at is not None:
            _mount(device, mount_at, read_only=record is not None and (record.read_only or "@" in called))
    except BaseException:
        # What was attached by somebody else stays.
        if made:
            _detach(context, records, called, force=False)
        raise
    if output == "json":
        show_json(_described(context, records, cast("Record", records.find(called))))
    else:
        click.echo(device)


@click.command()
@click.argument("name", metavar="POOL/VOL[@SNAP]|DEVICE")
@click.option("--unmount", is_flag=True, help="Unmount it first, wherever it is mounted.")
@click.option("--force", is_flag=True, help="Detach what is in use too: its I/O FAILS from then on.")
@output_option
@pass_context
def detach(context: Context, name: str, unmount: bool, force: bool, output: str) -> None:
    """End the block device of a volume or snapshot.

    One that is mounted is refused. --force also helps where the daemon is gone for good and I/O waits for it.
    """
    from terrace.attach import filesystem

    records = _records(context)
    record = _find(context, records, name)
    unmounted = filesystem.unmount_all(record.device) if unmount and _is_ours(context, record) else []
    _detach(context, records, record.name, force=force)
    if output == "json":
        show_json({"detached": record.name, "device": record.device, "unmounted": unmounted})
    else:
        click.echo(f"{record.name} is detached.")


def grow_device(context: Context, name: str, size_bytes: int) -> None:
    """Let the device of a volume that was resized have its new size before anybody uses it. Never fails."""
    from terrace.attach import filesystem
    from terrace.attach.record import AttachError, Records, directory_of

    records = Records(directory_of(context.home))
    try:
        record = records.find(name)
        if record is None or records.tell_keeper(name, signal.SIGHUP) is None:
            return
    except AttachError:
        return
    deadline_s = time.monotonic() + 5
    while filesystem.size_bytes_of(record.device) != size_bytes // 512 * 512 and time.monotonic() < deadline_s:
        time.sleep(0.02)


def require_detached(context: Context, name: str, done: str) -> None:
    """Raise AttachError if a volume or snapshot is a block device of this host, and so can't be `done`."""
    from terrace.attach import filesystem
    from terrace.attach.record import AttachError, Records, directory_of

    records = Records(directory_of(context.home))
    try:
        record = records.find(name) if records.keeper(name) is not None else None
    except AttachError:
        return  # the daemon refuses too, only with less to say
    if record is not None:
        mounts = filesystem.users_of(record.device).mounts
        where = f", mounted at {', '.join(mounts)}" if mounts else ""
        raise AttachError(
            errno.EBUSY,
            f"{name} is attached as {record.device}{where}, and can't be {done}: terrace detach {name} first",
        )


# Attaching


def _records(context: Context) -> Records:
    from terrace.attach.record import Records, directory_of

    return Records(directory_of(context.home))


def _called(name: tuple[str, str, str | None]) -> str:
    pool, volume, snapshot = name
    return f"{pool}/{volume}@{snapshot}" if snapshot is not None else f"{pool}/{volume}"


def _attach(context: Context, records: Records, called: str, arguments: list[str]) -> tuple[str, bool]:
    """The device, and whether this call has made it."""
    from terrace.attach.record import AttachError

    deadline_s = time.monotonic() + _START_PATIENCE_S
    while True:
        record = records.attached(called)
        if record is not None:
            if not _is_ours(context, record):
                raise AttachError(
                    errno.ENODEV,
                    f"{record.device} is not the device of {called} any more, for somebody else has ended it: terrace "
                    f"detach {called}, then attach it again",
                )
            return record.device, False
        _require_served(context, called)
        try:
            with patience(f"Attaching {called}"):
                return _start_keeper(context, records, called, arguments), True
        except AttachError as error:
            # Another call is attaching it at this moment: then its device is ours too.
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise


def _require_served(context: Context, called: str) -> None:
    """Raise AttachError where another node serves it; of all else the keeper tells."""
    from terrace.attach.record import AttachError

    pool, _, volume = called.partition("/")
    if "@" in volume:
        return
    try:
        with context.connect() as client:
            mirror = client.get("pools", pool, "volumes", volume)["mirror"]
    except click.ClickException:
        return
    elsewhere = served_elsewhere(mirror)
    if elsewhere is not None:
        raise AttachError(
            errno.ENODEV,
            f"{called} can't be attached {elsewhere.replace('none here: ', 'here: ')}; attach it there, or make this "
            f"node the primary: terrace volume mirror promote {called}",
        )


def _require_as_asked(record: Record, read_only: bool, driver: Asked) -> None:
    """Raise AttachError if what is attached already is not what was asked for."""
    from terrace.attach.record import AttachError

    if read_only and not record.read_only:
        how = "can be written"
    elif driver not in ("auto", record.driver):
        how = f"by the driver {record.driver}"
    else:
        return
    raise AttachError(
        errno.EEXIST,
        f"{record.name} is attached already, as {record.device}, and {how}: terrace detach {record.name} first to have "
        "it otherwise",
    )


def _start_keeper(context: Context, records: Records, called: str, arguments: list[str]) -> str:
    """Start a keeper of its own session; returns the device when it is there. Raises AttachError with its sentence."""
    from terrace.attach.record import AttachError

    records.prepare()
    log_file = records.log_file(called)
    reading, writing = os.pipe()
    try:
        command = [
            *(sys.executable, "-P", "-m", "terrace.cli", "--home", str(context.home.path), "attach", called),
            *("--foreground", "--report-to", str(writing), *arguments),
        ]
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                start_new_session=True,
                cwd="/",
            )
    finally:
        os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()  # until it has said it all, or is gone
    except BaseException:
        process.terminate()  # Ctrl-C: it detaches again
        raise
    try:
        report = json.loads(said)
    except ValueError:
        process.wait()
        raise AttachError(
            errno.EIO, f"the keeper of {called} ended (exit status {process.returncode}): see {log_file}"
        ) from None
    if "device" in report:
        process.returncode = 0  # it stays, and is nobody's child when this process has ended
        return str(report["device"])
    process.wait()
    log_file.unlink(missing_ok=True)  # it says no more than that
    raise AttachError(report["errno"], report["error"])


def _make_filesystem(device: str, kind: Kind, force: bool) -> None:
    from terrace.attach import filesystem

    with patience(f"Making {kind} on {device}"):
        filesystem.make(device, kind, force=force)


def _mount(device: str, directory: str, *, read_only: bool) -> None:
    from terrace.attach import filesystem

    filesystem.mount(device, Path(directory).expanduser().absolute(), read_only=read_only)


# The keeper


def _stay(
    context: Context,
    name: tuple[str, str, str | None],
    mkfs: Kind | None,
    mount_at: str | None,
    force: bool,
    read_only: bool,
    asked: Asked,
    connections: int,
    dead_timeout_s: int,
    report_to: int | None,
    output: str,
) -> None:
    """Be the keeper."""
    import trio

    from terrace.attach.driver import Order
    from terrace.attach.keeper import keep
    from terrace.reclaim import be_spared, stand_apart

    called = _called(name)
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler = logging.StreamHandler(sys.stderr) if report_to is None else _records(context).log_handler(called)
    logging.basicConfig(handlers=[handler], level=logging.INFO, format=stamp + "%(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def prepare(device: str) -> None:
        if mkfs:
            _make_filesystem(device, mkfs, force)
        if mount_at is not None:
            _mount(device, mount_at, read_only=read_only or name[2] is not None)

    def ready(device: str) -> None:
        if report_to is not None:
            _report(report_to, {"device": device})
        elif output == "json":
            records = _records(context)
            show_json(_described(context, records, cast("Record", records.find(called))))
        else:
            click.echo(device)
        sys.stdout.flush()

    try:
        there = _is_there(context, called)
        address = _address(context, name, taken_over=there, writes=not (read_only or there))
        chosen, driver = _driver(context, called, asked)
        left = _records(context).find(called)  # by a keeper that was killed
        if left is not None and left.driver == chosen:
            connections = max(connections, left.connections)
        order = Order(
            home=context.home,
            name=called,
            address=address,
            read_only=read_only or name[2] is not None,
            connections=connections if chosen == "nbd" else 1,
            dead_timeout_s=dead_timeout_s,
        )
        stand_apart()
        be_spared()
        with _one_error():
            trio.run(partial(keep, order, chosen, driver, ready=ready, prepare=prepare))
    except OSError as error:
        if report_to is None:
            raise
        logging.getLogger("terrace.attach").error("%s", error)
        _report(report_to, {"error": error.strerror or str(error), "errno": error.errno or errno.EIO})
        raise click.exceptions.Exit(1) from None


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Of several tasks that fail together the first one is told, as an error of its own."""
    from terrace.attach.record import AttachError

    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, OSError):
            raise AttachError(error.errno or errno.EIO, error.strerror or str(error)) from None
        raise


def _report(fd: int, content: dict[str, Any]) -> None:
    """Tell the process that started this one, which waits for the end of the pipe."""
    with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "w") as pipe:
        json.dump(content, pipe)


def _is_there(context: Context, called: str) -> bool:
    """Whether a keeper that is gone left a device in the kernel."""
    return _left_device(context, called) is not None


def _left_device(context: Context, called: str) -> int | None:
    from terrace.attach import kernelnbd
    from terrace.attach.driver import Order

    return kernelnbd.find_left_device(Order(context.home, called, context.home.nbd_socket))


def _driver(context: Context, called: str, asked: Asked) -> tuple[str, Driver]:
    """Name and driver. What a keeper left is taken over by the driver that made it."""
    from terrace.attach import fuseloop, kernelnbd
    from terrace.attach.choose import Means, choose

    root = os.geteuid() == 0
    if root and _is_there(context, called):
        return "nbd", kernelnbd.attached
    no_nbd = kernelnbd.available() if root and asked != "fuse" else None
    no_fuse = fuseloop.available() if root and asked != "nbd" else None
    chosen = choose(asked, Means(root, _reason(no_nbd), _reason(no_fuse)))
    if chosen == "nbd":
        return chosen, kernelnbd.attached
    return chosen, fuseloop.driver(fuseloop.backing())


def _reason(error: OSError | None) -> str | None:
    if error is None:
        return None
    if error.errno == errno.ENOENT:
        return "the kernel has no module nbd"
    return error.strerror or str(error)


def _address(context: Context, name: tuple[str, str, str | None], *, taken_over: bool, writes: bool) -> Address:
    """Where the daemon serves NBD; its Unix socket, if it has one. Raises ApiError, also for no such volume.

    `writes`: the volume shall be written to. Raises AttachError while a restore or an import is filling it.
    """
    from nbd.uri import parse_uri
    from terrace.apiclient import NotRunningError
    from terrace.attach.record import AttachError

    pool, volume, snapshot = name
    try:
        with context.connect() as client:
            path = ["pools", pool, "volumes", volume]
            found = client.get(*path, *(["snapshots", snapshot] if snapshot is not None else []))
            if writes and snapshot is None and found["filling"]:
                raise AttachError(
                    errno.EINPROGRESS,
                    f"{_called(name)} is being filled and not complete, so nobody else should write to it: wait until "
                    f"that has ended, or say --read-only; if nobody fills it any more, `terrace volume show "
                    f"{_called(name)}` says what to do",
                )
            uris = client.get("status")["nbd"]["uris"]
    except NotRunningError:
        if not taken_over:
            raise
        # Its device is there, and waits for the daemon.
        return context.home.nbd_socket
    uris.sort(key=lambda uri: not uri.startswith("nbd+unix:"))
    return parse_uri(uris[0])[0]


# Detaching


def _find(context: Context, records: Records, name: str) -> Record:
    """What is attached under a name, or as a device."""
    from terrace.attach import fuseloop, kernelnbd, links
    from terrace.attach.record import AttachError, Record

    if name.startswith("/"):
        device = os.path.realpath(name)
        for record in records.all():
            if record.device == device and _is_ours(context, record):
                return record
        raise AttachError(errno.ENOENT, f"{name} is no device that terrace attached: terrace attach --list shows those")
    called = _called(VERSION.convert(name, None, None))
    found = records.find(called)
    if found is not None:
        return found
    # A keeper that was killed before it wrote its record.
    index = _left_device(context, called)
    device_left = fuseloop.find_device(context.home, called) if index is None else kernelnbd.device_path(index)
    if device_left is None:
        raise AttachError(errno.ENOENT, f"{called} is not attached: terrace attach --list shows what is")
    # It may have made its link.
    link = None if links.made_by_udev() else str(links.DIRECTORY / called)
    return Record(called, "fuse" if index is None else "nbd", device_left, False, 1, link, 0.0, None, 0)


def _is_ours(context: Context, record: Record) -> bool:
    """Whether the recorded device is still that of the volume. Who ends it by other tools frees its number."""
    from terrace.attach import fuseloop, kernelnbd
    from terrace.attach.record import identifier

    if record.driver == "nbd":
        backend = identifier(context.home, record.name)
        return kernelnbd.is_device_of(backend, kernelnbd.index_of(record.device))
    return fuseloop.is_device_of(context.home, record.name, record.device)


def _detach(context: Context, records: Records, called: str, *, force: bool) -> None:
    """Have the keeper detach it, or do what a keeper that is gone has left to do. Raises AttachError."""
    from terrace.attach import filesystem
    from terrace.attach.record import AttachError

    record = _find(context, records, called)
    if not force and _is_ours(context, record):
        filesystem.require_unused(record.device, called)
    with patience(f"Detaching {called}"):
        pid = records.tell_keeper(called, signal.SIGKILL if force else signal.SIGTERM)
        if pid is not None and not records.wait_until_gone(called, _STOP_PATIENCE_S):
            raise AttachError(
                errno.EBUSY,
                f"the keeper of {called} (process {pid}) has not detached it in {_STOP_PATIENCE_S:.0f} s: it waits for "
                "what uses the device, or for the daemon; --force doesn't",
            )
        # A keeper that ended as it should has left nothing.
        with records.held(called):
            _clear(context, record, force=force)
            records.forget(called)


def _clear(context: Context, record: Record, *, force: bool) -> None:
    """Remove a device that has no keeper."""
    from terrace.attach import fuseloop, kernelnbd, links
    from terrace.attach.record import AttachError

    links.remove(record.link, record.device)
    index = _left_device(context, record.name)
    if index is not None:
        kernelnbd.disconnect(index)
    try:
        fuseloop.clear_left_over(context.home, record.name)
    except AttachError as error:
        # By force: the kernel removes it when its last user is gone.
        if not force or error.errno != errno.EBUSY:
            raise


# Showing


def _described(context: Context, records: Records, record: Record) -> dict[str, Any]:
    from terrace.attach import filesystem

    ours = _is_ours(context, record)
    users = filesystem.users_of(record.device) if ours else filesystem.Users([], [])
    return {
        "name": record.name,
        "device": record.device,
        "link": record.link,
        "driver": record.driver,
        "size_bytes": filesystem.size_bytes_of(record.device) if ours else 0,
        "read_only": record.read_only,
        "connections": record.connections,
        "mounts": users.mounts,
        "holders": users.holders,
        "keeper": records.keeper(record.name),
        "since": record.since,
    }


def _show_all(context: Context, output: str) -> None:
    records = _records(context)
    found = [_described(context, records, record) for record in records.all()]
    if output == "json":
        show_json(found)
        return
    rows = [
        (
            one["name"],
            one["device"],
            one["driver"],
            format_size(one["size_bytes"]) + (", read-only" if one["read_only"] else ""),
            ", ".join([*one["mounts"], *one["holders"]]) or "-",
            duration(max(0.0, time.time() - one["since"])),
            one["keeper"] or "gone: attach again",
        )
        for one in found
    ]
    show_table(
        ["Volume", "Device", "Driver", ">Size", "In use", ">For", ">Keeper"],
        rows,
        empty="Nothing is attached; terrace attach POOL/VOL makes a block device of a volume.",
        spare=["For"],
    )
