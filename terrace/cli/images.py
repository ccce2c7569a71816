"""`terrace volume import` and `export`: disk images, copied by qemu-img or nbdcopy over the daemon's NBD socket.

What an image's format means is for qemu-img alone to say. An import that fails leaves no volume behind, and one that
can't clean up any more (killed, or the daemon died) leaves one that is marked as not complete: it is made with that
mark, which goes when the copying program has flushed and ended. An export that fails leaves no file: it is written
beside its place and put there when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.context import VERSION, VOLUME, Context, pass_context
from terrace.cli.output import complain, output_option, patience, show_json, uris_of
from terrace.cli.policy import POLICY
from terrace.sizes import format_size
from tiers.names import MIN_VOLUME_BYTES, SECTOR_BYTES

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed")
_COPIERS = ("qemu-img", "nbdcopy")
"""Of raw images. nbdcopy is as fast, but tells its progress in steps of 128 MiB."""
PACKAGES = {"qemu-img": "qemu-utils", "nbdcopy": "libnbd-bin"}
_LEAVING_S = 5.0
"""The daemon gets so long to notice that a copying program has gone."""
_PERCENT = re.compile(rb"([0-9]+(?:\.[0-9]+)?)/100")

Advance = Callable[[int, int], None]


@click.command("import")
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="IMAGE")
@click.argument("volume", type=VOLUME, metavar="POOL/NEW")
@click.option("--format", "image_format", type=click.Choice(FORMATS), help="Default: what qemu-img finds.")
@click.option("--policy", type=POLICY, default="default", show_default=True, help="One that terrace policy list shows.")
@click.option("--keep", is_flag=True, help="Keep the half-filled volume if copying fails.")
@output_option
@pass_context
def import_image(
    context: Context,
    image: Path,
    volume: tuple[str, str],
    image_format: str | None,
    policy: str,
    keep: bool,
    output: str,
) -> None:
    """Make a volume of a disk image. What is empty in it takes no space.

    Say --format raw for an image whose content somebody else controls: it might pretend to be of another format.
    """
    pool, name = volume
    image = image.absolute()
    image_format, size_bytes = _inspect(image, image_format)
    program = _program(*_COPIERS) if image_format == "raw" else _program("qemu-img")
    with context.connect() as client, patience(f"Importing {image.name}") as advance:
        body = {"name": name, "size": size_bytes, "policy": policy, "filling": True}
        made = client.request("POST", "pools", pool, "volumes", body=body)["name"]
        uris = uris_of(client, made)
        uri = _nearest(uris)
        try:
            _copy(_filling(program, image, image_format, uri), size_bytes, advance, progress_fd=program == "nbdcopy")
            client.request("PUT", "pools", pool, "volumes", name, "filling", body={"filling": False})
            found = client.get("pools", pool, "volumes", name)
        except (OSError, click.ClickException) as error:
            left = f"{made} is kept, half filled and marked so" if keep else _discarded(client, pool, name)
            reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
            raise click.ClickException(f"importing {image} failed: {reason}; {left}") from None
        except BaseException:
            if not keep:
                _discarded(client, pool, name)
            raise
    if output == "json":
        show_json(found)
    else:
        sizes = f"{format_size(found['size_bytes'])}, {format_size(found['mapped_bytes'])} of it with data"
        click.echo(f"Volume {made} has {sizes}: {uris[0]}")


@click.command("export")
@click.argument("version", type=VERSION, metavar="POOL/VOL[@SNAP]")
@click.argument("file", metavar="FILE|-")
@click.option("--format", "image_format", type=click.Choice(("raw", "qcow2")), default="raw", show_default=True)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@output_option
@pass_context
def export_volume(
    context: Context,
    version: tuple[str, str, str | None],
    file: str,
    image_format: str,
    force: bool,
    output: str,
) -> None:
    """Write a snapshot, or a volume that nobody uses, to a disk image, or with - to a pipe.

    A volume that is written to meanwhile gives an image of no one moment: take a snapshot and export that.
    """
    pool, volume, snapshot = version
    if file == "-":
        if image_format != "raw":
            raise click.UsageError("only a raw image can be written to a pipe; name a FILE for another format")
        if sys.stdout.isatty():
            raise click.UsageError("a disk image doesn't belong on a terminal; name a FILE, or write to a pipe")
    target = Path(file).absolute()
    if file != "-" and not target.parent.is_dir():
        raise click.ClickException(f"{target.parent} is not a directory that exists; make it, or name another FILE")
    if file != "-" and (target.exists() or target.is_symlink()):
        if not target.is_file():
            raise click.ClickException(f"{file} is there and no regular file; name a FILE that can be replaced")
        if not force:
            raise click.ClickException(f"{file} exists; name another FILE, or say --force to replace it")
    names = ("nbdcopy",) if file == "-" else _COPIERS if image_format == "raw" else ("qemu-img",)
    program = _program(*names)
    with context.connect() as client, patience(f"Exporting {pool}/{volume}") as advance:
        path = ("pools", pool, "volumes", volume)
        found = client.get(*path) if snapshot is None else client.get(*path, "snapshots", snapshot)
        if snapshot is None and found["filling"]:
            raise click.ClickException(
                f"{found['name']} is not complete, and an image of a part would pass for the whole: terrace volume "
                f"show {found['name']} says what to do"
            )
        if snapshot is None and found["open_count"]:
            complain(f"{found['name']} is in use, so the image may be of no one moment; export a snapshot for that")
        uri = _nearest(uris_of(client, found["name"]))
        size_bytes = found["size_bytes"]
        if file == "-":
            sys.stdout.flush()
            _copy(["nbdcopy", "--progress={fd}", "--", uri, "-"], size_bytes, advance, progress_fd=True)
            return
        with _put_when_whole(target) as beside:
            command = _writing(program, uri, image_format, beside)
            _copy(command, size_bytes, advance, progress_fd=program == "nbdcopy")
            written_bytes = beside.stat().st_blocks * SECTOR_BYTES
    if output == "json":
        show_json({"exported": found["name"], "file": str(target), "format": image_format, "size_bytes": size_bytes})
    else:
        sizes = f"{format_size(size_bytes)} in a {image_format} image that takes {format_size(written_bytes)}"
        click.echo(f"{found['name']} is exported to {file}: {sizes}.")


def _inspect(image: Path, image_format: str | None) -> tuple[str, int]:
    """The format, and the size in bytes that a volume of it needs. Nothing but the image itself is opened."""
    if image_format == "raw":
        with image.open("rb") as opened:
            size_bytes = opened.seek(0, os.SEEK_END)
    else:
        hint = "" if image_format else "; or say --format raw if it is a raw image"
        _program("qemu-img", hint=hint)
        command = ["qemu-img", "info", "--output=json", *(["-f", image_format] if image_format else []), str(image)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise click.ClickException(f"qemu-img can't read {image}: {_reason(result.stderr)}")
        found: dict[str, Any] = json.loads(result.stdout)
        _require_alone(image, found)
        image_format, size_bytes = str(found["format"]), int(found["virtual-size"])
    if not size_bytes:
        raise click.ClickException(f"{image} is empty: a volume can't have 0 bytes")
    return image_format, max(MIN_VOLUME_BYTES, -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES)


def _require_alone(image: Path, found: dict[str, Any]) -> None:
    """An image may name other files, which qemu-img would read: whose, nobody has checked."""
    other = found.get("full-backing-filename") or found.get("backing-filename")
    details = found.get("format-specific", {}).get("data", {})
    other = other or (details.get("data-file") if isinstance(details, dict) else None)
    if other:
        raise click.ClickException(
            f"{image} takes data from {other}: if you trust that, import what `qemu-img convert -O qcow2 {image} "
            "WHOLE.qcow2` makes of both"
        )


def _program(*names: str, hint: str = "") -> str:
    """The first of these programs that is installed."""
    for name in names:
        if shutil.which(name):
            return name
    wanted = " or ".join(f"{name} (Debian package {PACKAGES[name]})" for name in names)
    raise click.ClickException(f"this needs {wanted}: install it and try again{hint}")


def _filling(program: str, image: Path, image_format: str, uri: str) -> list[str]:
    """The command that copies an image into a new volume, which is all zeros, and flushes."""
    if program == "nbdcopy":
        return ["nbdcopy", "--progress={fd}", "--destination-is-zero", "--flush", "--", str(image), uri]
    options = ["-n", "--target-is-zero", "-p", "-W", "-m", "16", "-t", "writeback"]
    return ["qemu-img", "convert", *options, "-f", image_format, "-O", "raw", str(image), uri]


def _writing(program: str, uri: str, image_format: str, file: Path) -> list[str]:
    """The command that copies an export into a new file."""
    if program == "nbdcopy":
        return ["nbdcopy", "--progress={fd}", "--flush", "--", uri, str(file)]
    return ["qemu-img", "convert", "-p", "-t", "writeback", "-f", "raw", "-O", image_format, uri, str(file)]


def _nearest(uris: Sequence[str]) -> str:
    """The Unix socket, if there is one."""
    return next((uri for uri in uris if uri.startswith("nbd+unix:")), uris[0])


def _copy(command: Sequence[str], size_bytes: int, advance: Advance, *, progress_fd: bool) -> None:
    """Run a copying program; its progress (`12.3/100`) is on its standard output, or on a descriptor `{fd}`.

    An exception here, as of Ctrl-C, ends it too. Raises ClickException with what it said if it fails.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as said, os.fdopen(reading, "rb", buffering=0) as progress:
        try:
            process = subprocess.Popen(
                [part.format(fd=writing) if part.startswith("--progress=") else part for part in command],
                stdin=subprocess.DEVNULL,
                stdout=None if progress_fd else writing,
                stderr=said,
                pass_fds=[writing] if progress_fd else [],
            )
        finally:
            os.close(writing)
        try:
            while chunk := progress.read(4096):
                if told := _PERCENT.findall(chunk):
                    advance(int(float(told[-1]) / 100 * size_bytes), size_bytes)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if status < 0 and "-" in command[-1:]:  # whoever read our output has enough
        raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
    if status:
        ended = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
        raise click.ClickException(f"{command[0]}: {_reason(text) or ended}")


def _reason(text: str) -> str:
    """The last line of what a program said, without its name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(qemu-img|nbdcopy): ", "", lines[-1]) if lines else ""


def _discarded(client: ApiClient, pool: str, name: str) -> str:
    """Delete a volume that was filled in vain, with what snapshots there may be; what to say of it."""
    deadline_s = time.monotonic() + _LEAVING_S
    while True:
        try:
            client.request("DELETE", "pools", pool, "volumes", name, query={"snapshots": "1"})
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                return (
                    f"the half-filled volume {pool}/{name}, which is marked so, could not be deleted ({error}): "
                    f"terrace volume delete {pool}/{name}"
                )
            time.sleep(0.05)
        else:
            return f"the half-filled volume {pool}/{name} was deleted (--keep keeps it)"


@contextlib.contextmanager
def _put_when_whole(target: Path) -> Any:
    """A path beside `target`, which replaces it when the block ends well, and is removed otherwise."""
    beside = target.with_name(f".{target.name[:200]}.{os.getpid()}.partial")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
