"""What every command shares: the connection to the daemon, parameter types, and completion of names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from terrace.home import Home, find_home
from terrace.sizes import parse_size

if TYPE_CHECKING:
    from terrace.apiclient import ApiClient
    from terrace.lastchange import LastChange


class Context:
    """The home that is meant; connects when first asked."""

    def __init__(self, home: str | None, change: LastChange | None = None) -> None:
        """`change` is told what is asked for."""
        self._change = change
        self.home: Home = find_home(home)
        self.chosen = bool(home or os.environ.get("TERRACE_HOME"))
        """Somebody said which, so it isn't the default."""

    def connect(self) -> ApiClient:
        # httpx takes a good part of the time that a command takes; --help shouldn't pay it.
        from terrace.apiclient import ApiClient
        from terrace.cli.waiting import tell_slow

        return ApiClient(self.home.api_socket, slow=tell_slow, change=self._change)


pass_context = click.make_pass_decorator(Context)


class SizeType(click.ParamType[int]):
    """A size in bytes. Whether a thing may have that size is for the daemon to say."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class SizeCommand(click.Command):
    """A command with a size among its arguments: tells `-1` from an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [one for one in self.params if isinstance(one, click.Option) and not one.is_flag]
        with_value = {name for one in options for name in one.opts}
        for before, arg in zip([None, *args], args, strict=False):
            if arg == "--":
                break
            if before in with_value:
                continue  # what an option makes of it is the option's affair
            if len(arg) > 1 and arg[0] == "-" and arg[1].isdigit():
                raise click.UsageError(f"{arg!r} is negative; write a size such as 512, 64M, 10G or 1.5T", ctx)
        return super().parse_args(ctx, args)


class PoolType(click.ParamType[str]):
    """A pool's name, completed from those that exist."""

    name = "pool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        for sign, called in (("/", "slash"), ("@", "@")):
            if sign in value:
                self.fail(f"{value!r} is not a pool's name, which has no {called}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [pool["name"] for pool in ask(ctx, "pools")]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class VolumeType(click.ParamType[tuple[str, str]]):
    """POOL/VOL as (pool, volume), completed from those that exist."""

    name = "pool/vol"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pool, slash, volume = value.partition("/")
        if "@" in value:
            self.fail(f"{value!r} has an @, as a snapshot's name has; a volume is needed here: POOL/VOL", param, ctx)
        if not slash or not pool or not volume or "/" in volume:
            self.fail(f"{value!r} doesn't name a volume; write POOL/VOL", param, ctx)
        return pool, volume

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _volume_names(ctx) if name.startswith(incomplete)]


class SnapshotType(click.ParamType[tuple[str, str, str]]):
    """POOL/VOL@SNAP as (pool, volume, snapshot), completed from those that exist; `new`: only up to the @."""

    name = "pool/vol@snap"

    def __init__(self, *, new: bool = False) -> None:
        self._new = new

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str, str]:
        if isinstance(value, tuple):
            return value
        volume, at, snapshot = value.partition("@")
        if "@" in snapshot or "/" in snapshot:
            self.fail(f"{value!r} doesn't name a snapshot: after the @ comes one name; write POOL/VOL@SNAP", param, ctx)
        pool, slash, name = volume.partition("/")
        if not slash or not pool or not name or "/" in name:
            self.fail(f"{value!r} doesn't name a snapshot; write POOL/VOL@SNAP", param, ctx)
        if not at or not snapshot:
            self.fail(f"{value!r} doesn't name a snapshot; write {volume}@SNAP", param, ctx)
        return pool, name, snapshot

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        volume, at, _ = incomplete.partition("@")
        if self._new or not at:
            return [CompletionItem(f"{name}@") for name in _volume_names(ctx) if name.startswith(volume)]
        return [CompletionItem(name) for name in _snapshot_names(ctx, volume) if name.startswith(incomplete)]


class VersionType(click.ParamType[tuple[str, str, str | None]]):
    """POOL/VOL or POOL/VOL@SNAP: what can be read."""

    name = "pool/vol[@snap]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str, str | None]:
        if isinstance(value, tuple):
            return value
        if "@" in value:
            return SNAPSHOT.convert(value, param, ctx)
        return *VOLUME.convert(value, param, ctx), None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return (SNAPSHOT if "@" in incomplete else VOLUME).shell_complete(ctx, param, incomplete)


class PlaceType(click.ParamType[tuple[str, str | None]]):
    """POOL or POOL/VOL: where snapshots are."""

    name = "pool[/vol]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | None]:
        if isinstance(value, tuple):
            return value
        if "/" in value:
            return VOLUME.convert(value, param, ctx)
        return POOL.convert(value, param, ctx), None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return (VOLUME if "/" in incomplete else POOL).shell_complete(ctx, param, incomplete)


def _volume_names(ctx: click.Context) -> list[str]:
    here = [volume["name"] for pool in ask(ctx, "pools") for volume in pool.get("volumes", ())]
    return here + [mirror["volume"] for mirror in ask(ctx, "mirrors") if mirror["diskless"]]


def _snapshot_names(ctx: click.Context, volume: str) -> list[str]:
    pool, _, name = volume.partition("/")
    return [snapshot["name"] for snapshot in ask(ctx, "pools", pool, "volumes", name, "snapshots")]


def ask(ctx: click.Context, *path: str) -> Any:
    """The answer for a completion, which must never print an error into somebody's prompt."""
    try:
        with Context(ctx.find_root().params.get("home")).connect() as client:
            return client.get(*path)
    except OSError:
        return []


class DeviceType(click.ParamType[dict[str, Any]]):
    """DEV: an existing path, or PATH=SIZE for a sparse file to be made. Absolute from here on."""

    name = "dev"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        path, equals, size = value.rpartition("=")
        # A path that exists is that path, even with an equals sign in it.
        if not equals or Path(value).exists():
            return {"path": _absolute(value), "size": None}
        try:
            return {"path": _absolute(path), "size": parse_size(size)}
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def _absolute(path: str) -> str:
    """Against this process's directory; symbolic links stay, for /dev/disk/by-id outlives /dev/sdb."""
    return str(Path(path).expanduser().absolute())


SIZE = SizeType()
POOL = PoolType()
VOLUME = VolumeType()
SNAPSHOT = SnapshotType()
NEW_SNAPSHOT = SnapshotType(new=True)
VERSION = VersionType()
PLACE = PlaceType()
DEVICE = DeviceType()


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost. Without a terminal to ask on, --yes has to have been said."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("this loses data and there is no terminal to ask on; say --yes if it is meant")
    click.confirm(question, abort=True, err=True)
