"""Backups and restores over NBD, against a real NBD server and a control API that is a model of terraced's."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from terrace.apiclient import ApiClient, ApiError
from terrace.backup.chain import choose
from terrace.backup.daemon import DaemonOrigin, DaemonTarget
from terrace.backup.directory import read_directory
from terrace.backup.errors import BackupError
from terrace.backup.nbdsource import diff_context
from terrace.backup.restore import restore
from terrace.backup.run import Origin, Outcome, back_up_to_directory
from terrace.backup.stream import StreamReader, Totals
from tests.nbd.client import Served, run, serving
from tests.nbd.memory import GRAIN, ContextExport, MemoryExport

SIZE = 64 * GRAIN


class Model:
    """As much of terraced as backups ask for: one pool, its volumes and their snapshots."""

    def __init__(self, served: Served) -> None:
        self.exports = served.exports.exports
        self.exports.clear()
        self.uri = f"nbd+unix:///?socket={served.directory}/nbd.sock"
        self.volumes: dict[str, dict[str, Any]] = {}
        self.snapshots: dict[str, list[dict[str, Any]]] = {}
        self.ids = itertools.count(1)
        self.offers_diffs = True

    def get(self, *path: str) -> Any:
        return self.request("GET", *path)

    def request(self, method: str, *path: str, body: Any = None) -> Any:
        match method, *path:
            case "GET", "status":
                return {"nbd": {"uris": ["nbd://127.0.0.1:9/", self.uri]}}
            case "GET", "pools", "p":
                return {"uuid": "0102"}
            case "GET", "pools", "p", "volumes", volume:
                return self._volume(volume)
            case "POST", "pools", "p", "volumes":
                self.make(body["name"], body["size"])
                self.volumes[body["name"]]["filling"] = body["filling"]
                return self._volume(body["name"])
            case "PATCH", "pools", "p", "volumes", volume:
                found = self._volume(volume)
                found["size_bytes"] = body["size"]
                old = self.exports[f"p/{volume}"]
                self._export(MemoryExport(f"p/{volume}", body["size"]), old)
                return found
            case "PUT", "pools", "p", "volumes", volume, "filling":
                self._volume(volume).update(body)
                return self._volume(volume)
            case "GET", "pools", "p", "volumes", volume, "snapshots":
                return self.snapshots[volume]
            case "POST", "pools", "p", "volumes", volume, "snapshots":
                if self._volume(volume)["filling"] and not body.get("by_filler"):
                    raise ApiError(errno.EBUSY, f"{volume} is being filled")
                return self.take(volume, body["name"])
            case "DELETE", "pools", "p", "volumes", volume, "snapshots", name:
                self.snapshots[volume] = [one for one in self.snapshots[volume] if one["name"] != name]
                del self.exports[f"p/{volume}@{name}"]
                return None
        raise AssertionError((method, path))

    def make(self, volume: str, size: int) -> MemoryExport:
        self.volumes[volume] = {"name": f"p/{volume}", "size_bytes": size, "id": next(self.ids), "filling": False}
        self.snapshots[volume] = []
        return self._export(MemoryExport(f"p/{volume}", size), None)

    def take(self, volume: str, name: str) -> dict[str, Any]:
        if any(one["name"] == name for one in self.snapshots[volume]):
            raise ApiError(errno.EEXIST, f"{volume} has a snapshot {name}")
        live = self.exports[f"p/{volume}"]
        made = ContextExport(f"p/{volume}@{name}", live.size_bytes, read_only=True)
        self._export(made, live)
        for one in self.snapshots[volume] if self.offers_diffs else ():
            older = bytes(self.exports[f"p/{volume}@{one['name']}"].data).ljust(live.size_bytes, b"\0")
            grains = range(0, live.size_bytes, GRAIN)
            made.flags[diff_context(one["name"])] = [
                int(live.data[at : at + GRAIN] != older[at : at + GRAIN]) for at in grains
            ]
        number = next(self.ids)
        self.snapshots[volume].append({"name": name, "id": number, "created_at": 1.7e9 + number})
        return self.snapshots[volume][-1]

    def _export(self, export: MemoryExport, like: MemoryExport | None) -> MemoryExport:
        if like is not None:
            count = min(like.size_bytes, export.size_bytes)
            export.view[:count] = like.view[:count]
            export.allocated[: count // GRAIN] = like.allocated[: count // GRAIN]
        self.exports[export.name] = export
        return export

    def _volume(self, volume: str) -> dict[str, Any]:
        if volume not in self.volumes:
            raise ApiError(errno.ENOENT, f"pool p has no volume {volume!r}")
        return self.volumes[volume]

    def scribble(self, volume: str, seed: int) -> None:
        rng = random.Random(seed)
        live = self.exports[f"p/{volume}"]
        for grain in rng.sample(range(live.size_bytes // GRAIN), 5):
            live.view[grain * GRAIN : (grain + 1) * GRAIN] = rng.randbytes(GRAIN)
            live.allocated[grain] = 1

    @property
    def client(self) -> ApiClient:
        return cast(ApiClient, self)


@contextlib.asynccontextmanager
async def modelled() -> AsyncIterator[Model]:
    async with serving() as served:
        model = Model(served)
        model.make("v", SIZE)
        yield model
        while served.server.status().connections:
            await trio.sleep(0.001)


async def back_up(model: Model, directory: Path, **options: Any) -> Outcome:
    origin: Origin = DaemonOrigin(model.client, "p", "v")
    return await back_up_to_directory(origin, directory, **options)


async def restored(model: Model, directory: Path, volume: str, first: int = 0, at: str | None = None) -> list[Totals]:
    """Apply a directory's chain to a volume, from its file number `first` on."""
    target = DaemonTarget(model.client, "p", volume, "default")
    path = choose(read_directory(directory).catalogue, directory, None, at)[first:]
    with contextlib.ExitStack() as stack:
        streams = [StreamReader(stack.enter_context(one.path.open("rb")), one.path.name) for one in path]
        return await restore(streams, target, target, await target.held(), target=f"p/{volume}")


def with_model(test: Callable[[Model], Any]) -> None:
    async def main() -> None:
        async with modelled() as model:
            await test(model)

    run(main)


def test_a_chain_is_made_and_restored_over_nbd_and_goes_on_later(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        for seed in range(3):
            model.scribble("v", seed)
            outcome = await back_up(model, tmp_path)
        assert outcome.header.base is not None and outcome.totals.data_bytes <= 5 * GRAIN
        assert outcome.header.volume_id == "0102/1" and outcome.header.snapshot.id.startswith("0102/")
        assert [one["name"].startswith("backup-") for one in model.snapshots["v"]] == [True]
        await restored(model, tmp_path, "new")
        assert model.exports["p/new"].data == model.exports["p/v"].data
        assert [one["name"][:9] for one in model.snapshots["new"]] == ["restored-"] * 3
        model.scribble("v", 9)
        await back_up(model, tmp_path)
        await restored(model, tmp_path, "new", 3)
        assert model.exports["p/new"].data == model.exports["p/v"].data
        assert "restore-check" not in {one["name"] for one in model.snapshots["new"]}

    with_model(test)


def test_only_what_is_stored_and_changed_is_read_over_nbd(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        model.scribble("v", 1)
        await back_up(model, tmp_path)
        model.scribble("v", 2)
        outcome = await back_up(model, tmp_path)
        (export,) = (export for export in model.exports.values() if "@" in export.name)
        reads = sum(length for name, _, length in export.calls if name in ("read", "read_now"))
        assert reads == outcome.totals.data_bytes <= 5 * GRAIN

    with_model(test)


def test_a_volume_that_grew_or_shrank_is_restored_with_its_sizes(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        model.scribble("v", 1)
        await back_up(model, tmp_path)
        for size in (2 * SIZE, SIZE // 2):
            model.request("PATCH", "pools", "p", "volumes", "v", body={"size": size})
            model.scribble("v", size)
            await back_up(model, tmp_path)
        await restored(model, tmp_path, "new")
        assert model.exports["p/new"].data == model.exports["p/v"].data
        assert len(model.exports["p/new"].data) == SIZE // 2

    with_model(test)


def test_a_target_that_was_written_to_or_resized_takes_no_increment(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        for seed in range(2):
            model.scribble("v", seed)
            await back_up(model, tmp_path)
        older = read_directory(tmp_path).catalogue.whole[0].header.snapshot.id
        for spoil in (
            lambda: model.scribble("new", 5),
            lambda: model.request("PATCH", "pools", "p", "volumes", "new", body={"size": SIZE // 2}),
        ):
            model.volumes.pop("new", None)
            await restored(model, tmp_path, "new", at=older)
            spoil()
            with pytest.raises(BackupError, match="p/new has changed since its snapshot restored-"):
                await restored(model, tmp_path, "new", 1)
        # A restore that was killed left its own snapshot behind.
        model.volumes.pop("new")
        await restored(model, tmp_path, "new", at=older)
        model.take("new", "restore-check")
        await restored(model, tmp_path, "new", 1)

    with_model(test)


def test_a_target_is_marked_from_before_its_first_byte_until_all_streams_were_applied(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        for seed in range(3):
            model.scribble("v", seed)
            await back_up(model, tmp_path)
        chain = read_directory(tmp_path).catalogue.whole
        seen: list[tuple[str, bool]] = []
        honest = model.request

        def request(method: str, *path: str, body: Any = None) -> Any:
            answer = honest(method, *path, body=body)
            if method != "GET":
                seen.append((path[-1], model.volumes["new"]["filling"]))
            return answer

        model.request = request  # type: ignore[method-assign]
        await restored(model, tmp_path, "new", at=chain[1].header.snapshot.id)
        applied = [("snapshots", True), ("filling", True), ("snapshots", True)]
        assert seen == [("volumes", True), *applied, ("filling", False)]
        seen.clear()
        await restored(model, tmp_path, "new", 2)
        probe = [("snapshots", False), ("restore-check", False)]
        assert seen == [*probe, ("filling", True), ("snapshots", True), ("filling", False)]

    with_model(test)


def test_a_restore_that_dies_leaves_a_volume_that_takes_no_further_one_before_it_is_rolled_back(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        for seed in range(2):
            model.scribble("v", seed)
            await back_up(model, tmp_path)
        older = read_directory(tmp_path).catalogue.whole[0].header.snapshot.id
        honest = model.request

        def dies_at(number: int) -> None:
            left = iter(range(number))

            def request(method: str, *path: str, body: Any = None) -> Any:
                if method in ("PUT", "POST") and path[-1] in ("filling", "snapshots") and next(left, None) is None:
                    raise ApiError(errno.ECONNREFUSED, "terraced has gone")
                return honest(method, *path, body=body)

            model.request = request  # type: ignore[method-assign]

        # Before the first marker; before the increment is marked as under way; before its marker; before the end.
        back = "roll it back to its snapshot restored-"
        for number, way in enumerate(("delete it", back, back, back)):
            model.volumes.pop("new", None)
            dies_at(number)
            with pytest.raises(ApiError, match="has gone"):
                await restored(model, tmp_path, "new")
            model.request = honest  # type: ignore[method-assign]
            for first in range(2):
                with pytest.raises(BackupError, match=f"p/new is not complete: .* has not ended.* {way}"):
                    await restored(model, tmp_path, "new", first)
            assert not any(one["name"] == "restore-check" for one in model.snapshots["new"])
        # Rolled back, which the engine takes for complete.
        model.volumes.pop("new")
        await restored(model, tmp_path, "new", at=older)
        dies_at(1)
        with pytest.raises(ApiError, match="has gone"):
            await restored(model, tmp_path, "new", 1)
        model.request = honest  # type: ignore[method-assign]
        marker = model.exports[f"p/new@{model.snapshots['new'][0]['name']}"]
        model.exports["p/new"].view[:] = marker.view
        model.volumes["new"]["filling"] = False
        await restored(model, tmp_path, "new", 1)
        assert model.exports["p/new"].data == model.exports["p/v"].data

    with_model(test)


def test_a_volume_that_is_there_but_was_never_restored_is_left_alone(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        await back_up(model, tmp_path)
        model.make("new", SIZE)
        with pytest.raises(BackupError, match="p/new exists"):
            await restored(model, tmp_path, "new")
        target = DaemonTarget(model.client, "p", "other", "default")
        assert await target.held() is None
        model.make("other", SIZE)
        with pytest.raises(BackupError, match="somebody has made p/other meanwhile"):
            async with target.open(SIZE):
                pass

    with_model(test)


def test_an_error_of_the_server_is_a_sentence_with_the_place(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        model.scribble("v", 1)
        model.exports["p/v"].fail = lambda operation, offset, length: 0
        model.take("v", "s")
        model.exports["p/v@s"].fail = lambda operation, offset, length: errno.EIO if operation[:4] == "read" else 0
        origin = DaemonOrigin(model.client, "p", "v")
        with pytest.raises(BackupError, match=r"p/v@s: READ of \d+ bytes at \d+: .*; see terrace status"):
            await back_up_to_directory(origin, tmp_path, "s")
        assert list(tmp_path.iterdir()) == []

    with_model(test)


def test_a_server_that_cannot_tell_what_changed_is_refused(tmp_path: Path) -> None:
    async def test(model: Model) -> None:
        await back_up(model, tmp_path)
        model.offers_diffs = False
        model.scribble("v", 1)
        with pytest.raises(BackupError, match="doesn't offer terrace:diff:backup-"):
            await back_up(model, tmp_path)
        assert len(model.snapshots["v"]) == 1

    with_model(test)


def test_what_is_not_there_is_the_daemons_own_sentence() -> None:
    async def test(model: Model) -> None:
        await trio.lowlevel.checkpoint()
        with pytest.raises(ApiError, match="pool p has no volume 'none'"):
            DaemonOrigin(model.client, "p", "none")

    with_model(test)
