"""The part of the control API that is about volumes which are not here: of mirrors that this node serves without a leg.

They have the paths of volumes, /v1/pools/P/volumes/V, where P is no pool of this node. What such a volume occupies and
which snapshots it has is known where its legs are: a node with a leg in sync is asked, those of the nearest first. What
only a pool can do is refused with the names of the nodes that have one.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from replication.membership import LegInfo
from replication.mirror import Mirror
from replication.snapshots import take_at_once
from terrace.apikit import Handler, ResizeBody, TakeBody, TakeOneBody, plain, read_body, require_shrink
from terrace.diskless import DisklessMirror
from terrace.mirroradmin import MirrorAdmin
from terrace.mirrors import Mirrors
from tiers import TierError
from tiers.names import validate_name
from tiers.pool import VolumeStatus

ASK_S: Final = 2.0
"""So long a node with a leg has to say what its pool knows."""


class DisklessApi:
    """Stands in for the handlers of `terrace.api.Api` that have the same names."""

    def __init__(self, mirrors: Mirrors, admin: MirrorAdmin) -> None:
        self._mirrors = mirrors
        self._admin = admin

    def or_here(self, handler: Handler) -> Handler:
        """`handler`, but for the volumes of mirrors that have no leg here."""
        own: Handler | None = getattr(self, handler.__name__, None)

        async def answer(request: Request) -> Response:
            pool = request.path_params["pool"]
            there = self._mirrors.diskless.in_pool(pool)
            if not there:
                return await handler(request)
            name = request.path_params.get("volume")
            if name is not None and self._mirrors.diskless.at(pool, name) is None:
                raise TierError(errno.ENOENT, f"there is no volume {pool}/{name}; `terrace volume list` shows all")
            if own is not None:
                return await own(request)
            mirror = there[0] if name is None else self._one(request)
            raise TierError(
                errno.ENOTSUP,
                f"{mirror.name} is served from here without a leg, so this is to be done on {mirror.where()}, where "
                "its copies and its snapshots are",
            )

        return answer

    def _one(self, request: Request) -> DisklessMirror:
        found = self._mirrors.diskless.at(request.path_params["pool"], request.path_params["volume"])
        assert found is not None, "`or_here` has seen it"
        return found

    # -- volumes -------------------------------------------------------------------------------------------------

    async def list_volumes(self, request: Request) -> Response:
        found: dict[str, dict[str, Any]] = {}

        async def one(mirror: DisklessMirror) -> None:
            found[mirror.name] = await self._volume(mirror)

        async with trio.open_nursery() as nursery:
            for mirror in self._mirrors.diskless.in_pool(request.path_params["pool"]):
                nursery.start_soon(one, mirror)
        return JSONResponse([found[name] for name in sorted(found)])

    async def show_volume(self, request: Request) -> Response:
        return JSONResponse(await self._volume(self._one(request)))

    async def resize_volume(self, request: Request) -> Response:
        body = await read_body(request, ResizeBody)
        mirror = self._one(request)
        require_shrink(mirror.name, mirror.size_bytes, body)
        await self._admin.resize(mirror, body.size)
        return JSONResponse(await self._volume(mirror))

    async def delete_volume(self, request: Request) -> Response:
        snapshots = request.query_params.get("snapshots") in ("1", "true")
        mirror = self._one(request)
        if request.query_params.get("force") in ("1", "true"):
            raise TierError(
                errno.EINVAL,
                f"{mirror.name} has no copy on this node that force could delete: `terrace volume mirror forget "
                f"{mirror.name}` lets this node have nothing to do with it",
            )
        if not snapshots and (await self._volume(mirror))["snapshots"]:
            raise TierError(
                errno.ENOTEMPTY, f"{mirror.name} has snapshots: delete them first, or with it, by --snapshots"
            )
        return JSONResponse(await self._admin.delete_diskless(mirror, snapshots=snapshots))

    async def _volume(self, mirror: DisklessMirror) -> dict[str, Any]:
        """As the pool of a leg tells it, with the name, the clients and the mirror of here."""
        shown: dict[str, Any] = plain(VolumeStatus(mirror.name, mirror.size_bytes, 0, 0))
        told = await self._ask(mirror)
        if told is not None:
            shown |= {key: value for key, value in told[1]["volume"].items() if key in shown and key != "queued"}
        return shown | {
            "name": mirror.name,
            "size_bytes": mirror.size_bytes,
            "open_count": mirror.stood_for.open_count,
            "filling": False,
            "origin": None,
            "policy": "default",
            "policy_missing": False,
            "mirror": self._mirrors.local_status(mirror),
        }

    async def _ask(self, mirror: DisklessMirror, snapshot: str | None = None) -> tuple[LegInfo, dict[str, Any]] | None:
        """What the pool of a leg in sync knows; None if none answers."""
        for leg in self._nearest(mirror):
            asked = {"leg": leg.id, "snapshot": snapshot}
            try:
                answer = await self._mirrors.peers.call(leg.node, "leg.status", asked, ASK_S)
                if isinstance(answer["volume"], dict) and isinstance(answer["snapshots"], list):
                    return leg, answer
            except (OSError, KeyError, TypeError):
                continue
        return None

    def _nearest(self, mirror: DisklessMirror) -> Sequence[LegInfo]:
        membership = mirror.membership
        if mirror.mirror is not None and (near := [member.info for member in mirror.mirror.readable()]):
            return near
        return [leg for leg in membership.legs if leg.id in membership.in_sync and leg.kind == "terrace"]

    # -- snapshots -----------------------------------------------------------------------------------------------

    async def list_snapshots(self, request: Request) -> Response:
        mirrors = (
            [self._one(request)]
            if "volume" in request.path_params
            else self._mirrors.diskless.in_pool(request.path_params["pool"])
        )
        found: list[dict[str, Any]] = []
        for mirror in mirrors:
            told = await self._ask(mirror)
            if told is None:
                raise TierError(
                    errno.EHOSTUNREACH, f"the snapshots of {mirror.name} are on {mirror.where()}, which can't be asked"
                )
            found += [self._snapshot(mirror, told[0], one) for one in told[1]["snapshots"]]
        return JSONResponse(found)

    async def take_snapshot(self, request: Request) -> Response:
        body = await read_body(request, TakeOneBody)
        return JSONResponse(await self._take(self._one(request), body.name), HTTPStatus.CREATED)

    async def take_snapshots(self, request: Request) -> Response:
        body = await read_body(request, TakeBody)
        pool = request.path_params["pool"]
        mirror = self._mirrors.diskless.at(pool, body.volumes[0])
        if mirror is None:
            raise TierError(errno.ENOENT, f"there is no volume {pool}/{body.volumes[0]}")
        if len(body.volumes) > 1:
            raise TierError(
                errno.ENOTSUP,
                f"{mirror.name} is served from here without a leg, and so has no instant in common with others: take "
                "one snapshot of each",
            )
        return JSONResponse([await self._take(mirror, body.name)], HTTPStatus.CREATED)

    async def _take(self, mirror: DisklessMirror, name: str) -> dict[str, Any]:
        """On every leg that is in sync, at one place in the order of writes."""
        validate_name("snapshot", name)
        served = await self._admin.served(mirror)
        told = await self._ask(mirror)
        if told is not None and any(one["snapshot"] == name for one in told[1]["snapshots"]):
            raise TierError(errno.EEXIST, f"{mirror.name}@{name} exists already; choose another name")

        async def here(mirrors: Sequence[Mirror]) -> None:
            await trio.lowlevel.checkpoint()  # there is no leg here

        taken = await take_at_once({served: name}, here)
        nodes = {leg.id: leg.place for leg in served.membership.legs}
        told = await self._ask(mirror, name)
        if told is None or not told[1]["snapshots"]:
            raise TierError(
                errno.EHOSTUNREACH, f"{mirror.name}@{name} was taken, but {mirror.where()} can't be asked about it now"
            )
        self._mirrors.tell("snapshot", f"{mirror.name}@{name}", f"{mirror.name}@{name} was taken, on {mirror.where()}")
        lacking = {nodes.get(leg, leg): why for leg, why in taken[served].items()}
        return self._snapshot(mirror, told[0], told[1]["snapshots"][-1]) | {"lacking": lacking}

    def _snapshot(self, mirror: DisklessMirror, leg: LegInfo, told: dict[str, Any]) -> dict[str, Any]:
        """`on`: a node that has it, and under which name it is an export there. What the others have isn't asked."""
        there = f"{leg.export}@{told['snapshot']}"
        return told | {
            "name": f"{mirror.name}@{told['snapshot']}",
            "volume": mirror.name,
            "legs": None,
            "on": {"node": leg.node, "export": there},
        }

    # -- exports -------------------------------------------------------------------------------------------------

    async def list_exports(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        there = self._mirrors.diskless.in_pool(request.path_params["pool"])
        return JSONResponse([plain(mirror.record) for mirror in there])

    async def show_export(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        pool, name = request.path_params["pool"], request.path_params["export"]
        mirror = self._mirrors.diskless.at(pool, name)
        if mirror is None:
            raise TierError(errno.ENOENT, f"there is no export {pool}/{name}")
        return JSONResponse(plain(mirror.record))
