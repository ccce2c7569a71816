"""However a mounted file system ends, nobody waits for ever, nothing stays mounted, and terraced goes on."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import pyfuse3
import pytest
import trio

from terrace.exports import Mirrored
from terrace.fuse.local import PoolDirectory
from terrace.fuse.service import serve_files
from terrace.fuse.session import mounted
from terrace.fuse.transmission import Transmission
from terrace.pools import Pools
from tests.system.mount import is_mounted

pytestmark = pytest.mark.system


class NoPools:
    """Stands in for `Pools`."""

    def open_pools(self) -> list[Any]:
        return []


class BrokenPools:
    def open_pools(self) -> NoReturn:
        raise RuntimeError("a bug of names")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a mount\\point"
    path.mkdir()
    yield path
    while is_there(path):
        subprocess.run(["umount", "-l", "-i", str(path)], check=True)


def is_there(directory: Path) -> bool:
    return is_mounted(Path(str(directory).replace("\\", "\\134").replace(" ", "\\040")))


async def until_mounted(directory: Path) -> None:
    with trio.fail_after(10):
        while not is_there(directory):
            await trio.sleep(0.01)


async def errno_of_listing(directory: Path) -> int | None:
    try:
        await trio.to_thread.run_sync(os.listdir, directory)
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("where", ["names", "bytes"])
def test_a_bug_unmounts_the_files_and_is_logged_and_terraced_goes_on(
    where: str, directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: Any = BrokenPools() if where == "names" else NoPools()

    def broken(self: Transmission) -> NoReturn:
        raise RuntimeError("a bug of bytes")

    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_files, cast(Pools, pools), cast(Mirrored, None), directory, trio.Event())
                await until_mounted(directory)
                if where == "bytes":
                    assert await errno_of_listing(directory) == 0
                    monkeypatch.setattr(Transmission, "_handle", broken)
                assert await errno_of_listing(directory) not in (0, None)

    with caplog.at_level(logging.ERROR):
        trio.run(main)
    assert not is_there(directory)
    record = next(record for record in caplog.records if "have failed and are unmounted" in record.message)
    assert record.exc_info and f"a bug of {where}" in caplog.text and str(directory) in record.message


def test_what_is_cancelled_is_unmounted_though_nobody_serves_any_more(directory: Path) -> None:
    async def once() -> None:
        with trio.CancelScope() as scope:
            async with (
                trio.open_nursery() as slow,
                mounted(PoolDirectory(cast(Pools, NoPools()), slow), directory),
            ):
                assert await errno_of_listing(directory) == 0
                scope.cancel()
                await trio.sleep_forever()
        assert not is_there(directory)

    for _ in range(3):  # the order in which tasks are told is random
        trio.run(once)


def test_what_cant_be_served_or_unmounted_in_order_doesnt_stay_mounted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()

    async def once() -> None:
        async with trio.open_nursery() as slow, mounted(PoolDirectory(cast(Pools, NoPools()), slow), directory):
            # As a signal to the whole process group does: killed without a word, but for the last one.
            fake = programs / "fusermount3"
            fake.write_text(f'#!/bin/sh\n[ "$2" = -z ] || kill -INT $$\nexec {shutil.which("fusermount3")} "$@"\n')
            fake.chmod(0o755)
            monkeypatch.setenv("PATH", str(programs), prepend=":")

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("libfuse has no memory")

    with monkeypatch.context() as patched:
        patched.setattr(pyfuse3, "init", refuse)
        with pytest.raises(ExceptionGroup):
            trio.run(once)
    assert not is_there(directory)
    trio.run(once)
    assert (programs / "fusermount3").exists() and not is_there(directory)


def test_what_was_aborted_beneath_its_users_is_unmounted(directory: Path) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with (
                trio.open_nursery() as slow,
                mounted(PoolDirectory(cast(Pools, NoPools()), slow), directory) as session,
            ):
                fd = await trio.to_thread.run_sync(os.open, directory, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    # umount --force: the connection is aborted, and the mount stays since it is busy.
                    umount = ["umount", "-f", "-i", str(directory)]
                    done = await trio.run_process(umount, check=False, capture_stderr=True)
                    assert done.returncode and is_there(directory)
                    await session.ended.wait()
                finally:
                    await trio.to_thread.run_sync(os.close, fd)
        assert not is_there(directory)

    trio.run(main)
