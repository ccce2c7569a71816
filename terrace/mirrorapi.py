"""The part of the control API that is about nodes and mirrors.

GET    /v1/nodes                                   this node, where it has a name, and its peers
GET    /v1/nodes/N                                 one of them, with the legs of mirrors that it has
POST   /v1/nodes/N/drain                           {to?, dry_run?}; only of this node: {demote, refused}
GET    /v1/mirrors                                 all mirrors that this node has a part in, as their primaries see it
GET    /v1/diskless                                first parts of the names of those that have no leg here
GET    /v1/tiebreakers                             [{mirror, primary, legs}]: those that it only has a say in
GET    /v1/pools/P/volumes/V/mirror                one of them
GET    /v1/pools/P/volumes/V/mirror/explain        {state, legs, text}: what is wrong, what is waited for, what to do
POST   /v1/pools/P/volumes/V/mirror/legs           {node, pool?, voter?, arbiter?}; one more leg, or the first but
                                                       one; voter: no leg, only a say; arbiter: legs or etcd. A node
                                                       may be an NBD URI here and below, percent-encoded in paths: a
                                                       leg on any NBD server
DELETE /v1/pools/P/volumes/V/mirror/legs/N[?force=1]   tells {removed, left, mirrored, voter}
POST   /v1/pools/P/volumes/V/mirror/promote        {force?, dry_run?, from?, name?}; dry_run tells {may_lose}; from: a
                                                       node that has a leg, where this one has none, and name: what it
                                                       is to be called here, if not P/V
POST   /v1/pools/P/volumes/V/mirror/demote         {to?, force?}
POST   /v1/pools/P/volumes/V/mirror/forget         {force?}; where this node has no leg: to have no part in it any more
POST   /v1/pools/P/volumes/V/mirror/resync         {node, discard?, full?}
    POST   /v1/pools/P/volumes/V/mirror/verify         {full?, repair?}; streams as a check does, then {report}
"""

from __future__ import annotations

import errno
from contextlib import nullcontext
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from replication.membership import Options
from terrace.apikit import Body, Progress, Stream, read_body, route
from terrace.diskless import DisklessMirror
from terrace.mirroradmin import Arbiters, MirrorAdmin, Place
from terrace.mirrors import Mirrors
from terrace.pools import Pools
from terrace.primary import MirrorPart
from terrace.tiebreakers import shown_vote
from tiers import TierError


class PlaceBody(Body):
    """Where a leg is to be."""

    node: str
    pool: str | None = None

    def place(self) -> Place:
        """For `MirrorAdmin`."""
        return Place(self.node, self.pool)


class AddBody(PlaceBody):
    voter: bool = False
    arbiter: Arbiters | None = None


class DrainBody(Body):
    to: str | None = None
    dry_run: bool = False


class PromoteBody(Body):
    force: bool = False
    dry_run: bool = False
    source: str | None = Field(None, alias="from")
    name: str | None = None


class ForgetBody(Body):
    force: bool = False


class DemoteBody(Body):
    to: str | None = None
    force: bool = False


class ResyncBody(Body):
    node: str
    discard: bool = False
    full: bool = False


class VerifyBody(Body):
    full: bool = False
    repair: bool = False


class MirrorApi:
    """The handlers."""

    def __init__(self, pools: Pools, mirrors: Mirrors, admin: MirrorAdmin) -> None:
        self._pools = pools
        self._mirrors = mirrors
        self._admin = admin

    def routes(self) -> list[Route]:
        """For the application."""
        mirror = "/v1/pools/{pool}/volumes/{volume}/mirror"
        return [
            route("GET", "/v1/nodes", self.list_nodes),
            route("GET", "/v1/nodes/{node}", self.show_node),
            route("POST", "/v1/nodes/{node}/drain", self.drain_node),
            route("GET", "/v1/mirrors", self.list_mirrors),
            route("GET", "/v1/diskless", self.list_diskless),
            route("GET", "/v1/tiebreakers", self.list_tiebreakers),
            route("GET", mirror, self.show_mirror),
            route("GET", f"{mirror}/explain", self.explain_mirror),
            route("POST", f"{mirror}/legs", self.add_leg),
            route("DELETE", f"{mirror}/legs/{{node:path}}", self.remove_leg),
            route("POST", f"{mirror}/promote", self.promote),
            route("POST", f"{mirror}/demote", self.demote),
            route("POST", f"{mirror}/forget", self.forget),
            route("POST", f"{mirror}/resync", self.resync),
            route("POST", f"{mirror}/verify", self.verify),
        ]

    async def list_nodes(self, request: Request) -> Response:
        return JSONResponse(self._mirrors.peers.status())

    async def show_node(self, request: Request) -> Response:
        name = request.path_params["node"]
        found = next((one for one in self._mirrors.peers.status() if one["name"] == name), None)
        if found is None:
            self._mirrors.peers.peer(name)
            raise AssertionError("a peer that has no status")
        return JSONResponse(found | {"legs": await self._mirrors.legs_on(name)})

    async def drain_node(self, request: Request) -> Response:
        body = await read_body(request, DrainBody)
        return JSONResponse(await self._admin.drain(request.path_params["node"], to=body.to, dry_run=body.dry_run))

    async def list_mirrors(self, request: Request) -> Response:
        return JSONResponse(await self._mirrors.statuses())

    async def list_diskless(self, request: Request) -> Response:
        return JSONResponse(self._mirrors.diskless.pools())

    async def list_tiebreakers(self, request: Request) -> Response:
        return JSONResponse([shown_vote(record) for record in await self._mirrors.votes()])

    async def _shown(self, request: Request) -> MirrorPart:
        """As `_one`, for what only shows it: where this node is but its tie-breaker, that is said."""
        try:
            return self._one(request)
        except OSError as error:
            await self._mirrors.tell_if_vote(request.path_params["pool"], request.path_params["volume"], error)
            raise

    def _one(self, request: Request) -> MirrorPart:
        return self._mirrors.part(request.path_params["pool"], request.path_params["volume"])

    async def _status(self, mirror: MirrorPart, status: int = 200) -> Response:
        return JSONResponse(await self._mirrors.status(mirror), status)

    async def show_mirror(self, request: Request) -> Response:
        mirror = await self._shown(request)
        found = await self._mirrors.status(mirror)
        counted = await self._admin.snapshots.counted(mirror)
        for leg in found["legs"]:
            unknown = {"snapshots": None, "lacking_snapshots": None}
            leg |= counted.get(leg["node"], unknown) if leg["kind"] == "terrace" else unknown
        return JSONResponse(found)

    async def explain_mirror(self, request: Request) -> Response:
        mirror = await self._shown(request)
        found = await self._mirrors.explained(mirror)
        legs = {leg["export"] if leg["kind"] == "nbd" else leg["node"]: leg["state"] for leg in found["legs"]}
        sentences = [found["text"]]
        if isinstance(mirror, DisklessMirror):
            what = "serves it" if mirror.serves else "takes part in it"
            sentences.append(f"Node {self._mirrors.node} {what} without a leg of its own.")
        if (kept := mirror.kept_state()) is not None:
            sentences.append(f"The last consistent state of the leg here is kept as {kept}.")
        return JSONResponse({"volume": mirror.name, "state": found["state"], "legs": legs, "text": " ".join(sentences)})

    async def add_leg(self, request: Request) -> Response:
        body = await read_body(request, AddBody)
        if body.voter:
            return await self._status(await self._admin.add_voter(self._one(request), body.node), 201)
        if (diskless := self._diskless(request)) is not None:
            await self._admin.extend(diskless, body.place())
            return await self._status(diskless, 201)
        with self._pools.using(request.path_params["pool"]) as pool:
            volume = pool.volume(request.path_params["volume"])
            mirror = await self._admin.add(pool, volume, body.place(), Options(), arbiter=body.arbiter)
            return await self._status(mirror, 201)

    async def remove_leg(self, request: Request) -> Response:
        force = request.query_params.get("force") in ("1", "true")
        node = request.path_params["node"]
        if (diskless := self._diskless(request)) is not None:
            return JSONResponse(await self._admin.remove(diskless, node, force=force))
        with self._pools.using(request.path_params["pool"]) as pool:
            volume = pool.volume(request.path_params["volume"])
            if not volume.mirror_record:
                return JSONResponse(await self._admin.nothing_to_remove(pool, volume, node))
            return JSONResponse(await self._admin.remove(self._one(request), node, force=force))

    def _diskless(self, request: Request) -> DisklessMirror | None:
        return self._mirrors.diskless.at(request.path_params["pool"], request.path_params["volume"])

    async def promote(self, request: Request) -> Response:
        body = await read_body(request, PromoteBody)
        if body.source is not None and not body.dry_run:
            volume = f"{request.path_params['pool']}/{request.path_params['volume']}"
            name = volume if body.name is None else body.name
            made = await self._admin.promote_diskless(volume, body.source, name=name, force=body.force)
            return await self._status(made)
        if body.name is not None:
            raise TierError(errno.EINVAL, "name: it goes with from, for a node that has no leg of the mirror")
        try:
            mirror = self._one(request)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            sentence = f"{error.strerror}; a node without a leg of a mirror is told who has one: --from NODE"
            raise TierError(errno.ENOENT, sentence) from None
        if body.dry_run:
            return JSONResponse({"may_lose": await self._admin.what_force_loses(mirror)})
        await self._admin.promote(mirror, force=body.force)
        return await self._status(mirror)

    async def demote(self, request: Request) -> Response:
        body = await read_body(request, DemoteBody)
        mirror = self._one(request)
        await self._admin.demote(mirror, to=body.to, force=body.force)
        return await self._status(mirror)

    async def forget(self, request: Request) -> Response:
        body = await read_body(request, ForgetBody)
        name = f"{request.path_params['pool']}/{request.path_params['volume']}"
        mirror = self._mirrors.diskless.by_name(name)  # also one that a pool here hides
        if mirror is None:
            mirrored = self._one(request)
            raise TierError(
                errno.EINVAL,
                f"this node has a leg of {mirrored.name}: `terrace volume mirror remove`, at its primary, takes it out",
            )
        await self._admin.forget(mirror, force=body.force)
        return JSONResponse({"forgotten": name})

    async def resync(self, request: Request) -> Response:
        body = await read_body(request, ResyncBody)
        mirror = self._one(request)
        await self._admin.resync(mirror, body.node, discard=body.discard, full=body.full)
        return await self._status(mirror)

    async def verify(self, request: Request) -> Response:
        body = await read_body(request, VerifyBody)
        mirror = self._one(request)
        await self._admin.served(mirror)  # refused with a status, before the stream begins

        async def verify(occupied: object, progress: Progress) -> dict[str, Any]:
            return {"report": await self._admin.verify(mirror, progress, full=body.full, repair=body.repair)}

        name = request.path_params["pool"]
        if isinstance(mirror, DisklessMirror):
            return Stream(nullcontext(mirror), name, verify)
        return Stream(self._pools.occupying(name), name, verify)
