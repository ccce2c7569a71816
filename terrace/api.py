"""The control API: JSON over HTTP on a Unix socket that only the daemon's own user may open.

    GET    /v1/status[?reset=1]               the daemon; reset=1 forgets the longest loop stall after telling it
    GET    /v1/pools                          every pool, failed ones with their error
    POST   /v1/pools                          {name, devices: [{path, tier, size?}], force?}
    GET    /v1/pools/P                        one pool
    DELETE /v1/pools/P[?force=1]              force: one that takes no writes any more or is not open, whatever is in it
    POST   /v1/pools/P/open                   {truncate_log?, give_up_map?}; try again to open a pool that failed
    POST   /v1/pools/P/grow                   {devices, force?}
    POST   /v1/pools/P/checkpoint
    POST   /v1/pools/P/check                  {full?}; streams {done_bytes, total_bytes} ..., then {report} or {error}
    GET    /v1/pools/P/evacuate               the evacuations of devices since the pool was opened, and what is lost
    POST   /v1/pools/P/evacuate               {device, action: "start" | "cancel" | "lost", truncate_log?}
    GET    /v1/metrics                        of nodes and mirrors, as text for Prometheus (`terrace.metrics`)
    GET    /v1/events[?after=N&wait=S]        events after number N; waits so many seconds (at most 60) for one
    GET    /v1/pools/P/scrub                  the newest scrub, with every damaged range that is kept
    POST   /v1/pools/P/scrub                  {action: "start" | "pause" | "stop", rate?}
    GET    /v1/pools/P/volumes
    POST   /v1/pools/P/volumes                {name, size, policy?, filling?, mirror?: [{node, pool?}], quorum?,
                                              timeout_s?, lease_s?, arbiter?: legs or etcd}
    GET    /v1/pools/P/volumes/V
    PATCH  /v1/pools/P/volumes/V              {size, shrink?}; a smaller size needs shrink, for it discards data
    DELETE /v1/pools/P/volumes/V[?snapshots=1]     and all its snapshots; without this it must have none; of a mirror
                                              at its primary all legs, tells {deleted, left}; force=1: only that here
    PUT    /v1/pools/P/volumes/V/policy       {policy}
    PUT    /v1/pools/P/volumes/V/filling      {filling}; by who fills it: true before the first byte, false at the end
    GET    /v1/pools/P/volumes/V/heat[?ranges=N]   what lies on which tier and how hot it is, in N ranges (1 to 4096)
    POST   /v1/pools/P/volumes/V/promote      streams as a check does, then {volume}; a clone needs its origin no more
    GET    /v1/pools/P/snapshots[?legs=1]     those of all volumes, with what each shares and what only it has;
                                              legs=1: asks the other nodes, and tells which legs have what
    POST   /v1/pools/P/snapshots              {name, volumes, local?, force?}; one of each volume, all of one instant,
                                              or none; of mirrors on every leg in sync; local: of the leg here only
    GET    /v1/pools/P/volumes/V/snapshots
    POST   /v1/pools/P/volumes/V/snapshots    {name, by_filler?}; by_filler: though it is being filled, it is whole
    GET    /v1/pools/P/volumes/V/snapshots/S[?legs=1]
    PATCH  /v1/pools/P/volumes/V/snapshots/S  {name?, held?, local?}
    DELETE /v1/pools/P/volumes/V/snapshots/S[?local=1]  tells what comes back, and what is left on other nodes
    POST   /v1/pools/P/volumes/V/snapshots/S/rollback   {keep_as?, safety?, force?}; the volume becomes what it was
    POST   /v1/pools/P/volumes/V/snapshots/S/clone      {name, policy?}; a new volume
    GET    /v1/policies                       every policy: its keys, which of them are given, and who has it
    GET    /v1/policies/N
    POST   /v1/policies/reload                read them anew from the configuration file; all or nothing
    GET    /v1/upgrade                        how far the daemon's replacement is, and how it came to serve
    POST   /v1/upgrade                        {"force": false}: let another process take over; see `terrace upgrade`

Nodes and mirrors have routes of their own: `terrace.mirrorapi`.

Sizes are bytes, or strings such as "10G". An error is {error, errno} with a 4xx or 5xx status; `error` is a sentence
for the operator. What a client sends is judged by the pydantic models here and by the engine, and by nobody else.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import trio
from pydantic import AfterValidator, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replication.membership import MAX_LEGS, Options
from terrace.apikit import (
    Body,
    Progress,
    ResizeBody,
    Stream,
    TakeBody,
    TakeOneBody,
    WhereBody,
    error_response,
    plain,
    read_body,
    require_shrink,
    route,
)
from terrace.definitions import Definitions
from terrace.disklessapi import DisklessApi
from terrace.events import Events
from terrace.exports import find_export, record_of, records_of
from terrace.metrics import CONTENT_TYPE, Metrics
from terrace.mirroradmin import Arbiters, MirrorAdmin
from terrace.mirrorapi import MirrorApi, PlaceBody
from terrace.mirrors import Mirrors
from terrace.mirrorsnapshots import MirrorSnapshots, listed
from terrace.pools import Pools, Slot
from terrace.sandbox import explained
from terrace.schema import Size
from terrace.sizes import format_size
from terrace.snapshots import Snapshots
from terrace.upgrade import Upgrade
from tiers import DeviceSpec, Pool, TierError
from tiers.heatmap import MAX_RANGES
from tiers.policy import DEFAULT_NAME

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 1 << 20
_LIST_STEP = 100
DEFAULT_RANGES = 512
"""Of a heat map."""


class DaemonStatus(Protocol):
    """What the API tells of the daemon itself."""

    def status(self, *, reset: bool) -> dict[str, Any]:
        """A JSON-able description; `reset` starts the stall measurement anew after reading it."""

    @property
    def upgrade(self) -> Upgrade:
        """Its replacement by another process."""


# What clients send


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path; the daemon doesn't know the client's directory")
    return path


class DeviceBody(Body):
    path: Annotated[Path, AfterValidator(_absolute)]
    tier: Literal["fast", "base"]
    size: Size | None = None

    def spec(self) -> DeviceSpec:
        return DeviceSpec(self.path, self.tier, self.size)


class GrowBody(Body):
    devices: list[DeviceBody] = Field(min_length=1, max_length=256)
    force: bool = False

    def specs(self) -> list[DeviceSpec]:
        return [device.spec() for device in self.devices]


class CreatePoolBody(GrowBody):
    name: str


class OpenBody(Body):
    truncate_log: bool = False
    give_up_map: bool = False


class CheckBody(Body):
    full: bool = False


def _as_rate(rate: int) -> int:
    if not 0 <= rate <= 1 << 50:
        raise ValueError(f"{rate} bytes a second is not possible; it must be at most 1 PiB, or 0: no limit")
    return rate


class EvacuateBody(Body):
    device: str
    action: Literal["start", "cancel", "lost"] = "start"
    truncate_log: bool = False


class ScrubBody(Body):
    action: Literal["start", "pause", "stop"]
    rate: Annotated[Size, AfterValidator(_as_rate)] | None = None


class CreateVolumeBody(Body):
    name: str
    size: Size
    policy: str = DEFAULT_NAME
    filling: bool = False
    mirror: list[PlaceBody] = Field(default=[], max_length=MAX_LEGS)
    quorum: Literal["suspend", "fail"] = "suspend"
    timeout_s: float = Field(Options().timeout_s, ge=0.1, le=60, allow_inf_nan=False)
    lease_s: float = Field(Options().lease_s, ge=0.1, le=60, allow_inf_nan=False)
    arbiter: Arbiters = "legs"


class PolicyBody(Body):
    policy: str


class FillingBody(Body):
    filling: bool


class ChangeSnapshotBody(Body):
    name: str | None = None
    held: bool | None = None
    local: bool = False


class RollbackBody(Body):
    keep_as: str | None = None
    safety: bool = True
    force: bool = False


class UpgradeBody(Body):
    force: bool = False


class CloneBody(Body):
    name: str
    policy: str | None = None


# What they get


def pool_summary(slot: Slot) -> dict[str, Any]:
    """One pool as the API shows it; one that isn't open has only its name, state and error."""
    if slot.pool is None:
        state = "failed" if slot.error else "busy"
        return {"name": slot.name, "state": state, "error": str(slot.error) if slot.error else None}
    status = plain(slot.pool.status())
    return {**status, "error": status["problem"]}


async def _long_list(statuses: Sequence[Any]) -> Response:
    """Dataclasses as a list of JSON; others have their turn meanwhile, since ten thousand take 0.2 s."""
    parts = []
    for start in range(0, len(statuses), _LIST_STEP):
        rows = [dataclasses.asdict(status) for status in statuses[start : start + _LIST_STEP]]
        parts.append(json.dumps(rows)[1:-1])
        await trio.lowlevel.checkpoint()
    return Response(f"[{','.join(parts)}]", media_type="application/json")


class Api:
    """The handlers. Every one leaves the daemon as it was when it raises."""

    def __init__(
        self,
        pools: Pools,
        daemon: DaemonStatus,
        definitions: Definitions,
        events: Events,
        mirrors: Mirrors,
        through: MirrorSnapshots,
    ) -> None:
        self._pools = pools
        self._daemon = daemon
        self._definitions = definitions
        self._events = events
        self._snapshots = Snapshots(self._clients, self._tell, through)
        self._mirrors = mirrors
        self._through = through
        self._admin = MirrorAdmin(mirrors, self._clients, through)
        self._metrics = Metrics(mirrors)

    def app(self) -> ASGIApp:
        """The ASGI application."""
        pool, volume = "/v1/pools/{pool}", "/v1/pools/{pool}/volumes/{volume}"
        snapshot = f"{volume}/snapshots/{{snapshot}}"
        here = DisklessApi(self._mirrors, self._admin).or_here
        routes = [
            route("GET", "/v1/status", self.status),
            route("GET", "/v1/pools", self.list_pools),
            route("POST", "/v1/pools", self.create_pool),
            route("GET", pool, here(self.show_pool)),
            route("DELETE", pool, self.delete_pool),
            route("POST", f"{pool}/open", self.open_pool),
            route("POST", f"{pool}/grow", self.grow_pool),
            route("POST", f"{pool}/checkpoint", self.checkpoint_pool),
            route("POST", f"{pool}/check", self.check_pool),
            route("GET", f"{pool}/evacuate", self.show_evacuations),
            route("POST", f"{pool}/evacuate", self.evacuate_device),
            route("GET", "/v1/events", self.list_events),
            route("GET", "/v1/metrics", self.show_metrics),
            route("GET", f"{pool}/scrub", self.show_scrub),
            route("POST", f"{pool}/scrub", self.scrub_pool),
            route("GET", f"{pool}/exports", here(self.list_exports)),
            route("GET", f"{pool}/exports/{{export}}", here(self.show_export)),
            route("GET", f"{pool}/volumes", here(self.list_volumes)),
            route("POST", f"{pool}/volumes", here(self.create_volume)),
            route("GET", volume, here(self.show_volume)),
            route("PATCH", volume, here(self.resize_volume)),
            route("DELETE", volume, here(self.delete_volume)),
            route("PUT", f"{volume}/policy", here(self.set_policy)),
            route("PUT", f"{volume}/filling", here(self.set_filling)),
            route("GET", f"{volume}/heat", here(self.show_heat)),
            route("POST", f"{volume}/promote", here(self.promote_volume)),
            route("GET", f"{pool}/snapshots", here(self.list_snapshots)),
            route("POST", f"{pool}/snapshots", here(self.take_snapshots)),
            route("GET", f"{volume}/snapshots", here(self.list_snapshots)),
            route("POST", f"{volume}/snapshots", here(self.take_snapshot)),
            route("GET", snapshot, here(self.show_snapshot)),
            route("PATCH", snapshot, here(self.change_snapshot)),
            route("DELETE", snapshot, here(self.delete_snapshot)),
            route("POST", f"{snapshot}/rollback", here(self.roll_back)),
            route("POST", f"{snapshot}/clone", here(self.clone_snapshot)),
            route("GET", "/v1/policies", self.list_policies),
            route("GET", "/v1/policies/{policy}", self.show_policy),
            route("POST", "/v1/policies/reload", self.reload_policies),
            route("GET", "/v1/upgrade", self.show_upgrade),
            route("POST", "/v1/upgrade", self.begin_upgrade),
            *MirrorApi(self._pools, self._mirrors, self._admin).routes(),
        ]
        return _BoundedBody(Starlette(routes=routes, exception_handlers={HTTPException: error_response}))

    async def show_metrics(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def status(self, request: Request) -> Response:
        reset = request.query_params.get("reset") in ("1", "true")
        status = self._daemon.status(reset=reset)
        status["nodes"] = self._mirrors.peers.status()
        status["arbiter"] = self._mirrors.arbiter.status()
        status["mirrors"] = await self._mirrors.statuses()
        return JSONResponse(status | {"pools": list(map(self._summary, self._pools.slots()))})

    async def list_pools(self, request: Request) -> Response:
        return JSONResponse(list(map(self._summary, self._pools.slots())))

    async def create_pool(self, request: Request) -> Response:
        body = await read_body(request, CreatePoolBody)
        with explained():
            self._mirrors.diskless.require_free(body.name)
            pool = await self._pools.create(body.name, body.specs(), force=body.force)
        return JSONResponse(self._summary(self._pools.slot(pool.name)), HTTPStatus.CREATED)

    async def show_pool(self, request: Request) -> Response:
        slot = self._pools.slot(request.path_params["pool"])
        if slot.pool is not None:
            with self._pools.using(slot.name) as pool:
                await _count_exactly(pool)
                await pool.losses()  # what was written since is none any more
        return JSONResponse(self._summary(self._pools.slot(request.path_params["pool"])))

    async def delete_pool(self, request: Request) -> Response:
        force = request.query_params.get("force") in ("1", "true")
        await self._pools.delete(request.path_params["pool"], force=force)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def open_pool(self, request: Request) -> Response:
        body = await read_body(request, OpenBody)
        with explained():
            pool = await self._pools.reopen(
                request.path_params["pool"], truncate_log=body.truncate_log, give_up_map=body.give_up_map
            )
        return JSONResponse(self._summary(self._pools.slot(pool.name)))

    async def grow_pool(self, request: Request) -> Response:
        body = await read_body(request, GrowBody)
        with self._pools.using(request.path_params["pool"]) as pool, explained():
            await pool.grow(body.specs(), force=body.force)
        return JSONResponse(self._summary(self._pools.slot(pool.name)))

    async def checkpoint_pool(self, request: Request) -> Response:
        with self._pools.using(request.path_params["pool"]) as pool:
            await pool.checkpoint()
            return JSONResponse(plain(pool.status()))

    async def check_pool(self, request: Request) -> Response:
        body = await read_body(request, CheckBody)
        name = request.path_params["pool"]
        self._pools.pool(name)  # what can be refused is refused with a status, before the stream begins

        async def check(pool: Pool, progress: Progress) -> dict[str, Any]:
            return {"report": plain(await pool.check(body.full, progress))}

        return Stream(self._pools.occupying(name), name, check)

    async def show_evacuations(self, request: Request) -> Response:
        with self._pools.using(request.path_params["pool"]) as pool:
            return JSONResponse(await _evacuations(pool))

    async def evacuate_device(self, request: Request) -> Response:
        body = await read_body(request, EvacuateBody)
        name = request.path_params["pool"]
        if body.truncate_log and body.action != "lost":
            raise TierError(errno.EINVAL, "truncate_log: it goes with a device that is lost")
        if body.action == "lost":
            await self._pools.give_up(name, body.device, truncate_log=body.truncate_log)
        with self._pools.using(name) as pool:
            if body.action == "start":
                await pool.evacuator.start(body.device)
            elif body.action == "cancel":
                await pool.evacuator.cancel(body.device)
            return JSONResponse(await _evacuations(pool))

    async def list_events(self, request: Request) -> Response:
        try:
            after = int(request.query_params.get("after", "0"))
            wait_s = min(60.0, max(0.0, float(request.query_params.get("wait", "0"))))
        except ValueError:
            raise TierError(errno.EINVAL, "after and wait are numbers") from None
        return JSONResponse(list(map(plain, await self._events.wait(after, wait_s))))

    async def show_scrub(self, request: Request) -> Response:
        with self._pools.using(request.path_params["pool"]) as pool:
            return JSONResponse(await _scrub_of(pool))

    async def scrub_pool(self, request: Request) -> Response:
        body = await read_body(request, ScrubBody)
        if body.rate is not None and body.action != "start":
            raise TierError(errno.EINVAL, f"rate: it is for starting a scrub; to {body.action} one takes none")
        with self._pools.using(request.path_params["pool"]) as pool:
            if body.action == "start":
                await pool.scrubber.start(body.rate)
            else:
                await (pool.scrubber.pause() if body.action == "pause" else pool.scrubber.stop())
            return JSONResponse(await _scrub_of(pool))

    async def list_exports(self, request: Request) -> Response:
        with self._pools.using(request.path_params["pool"]) as pool:
            return await _long_list(records_of(pool))

    async def show_export(self, request: Request) -> Response:
        with self._pools.using(request.path_params["pool"]) as pool:
            return JSONResponse(plain(record_of(pool, find_export(pool, request.path_params["export"]))))

    async def list_volumes(self, request: Request) -> Response:
        with self._pools.using(request.path_params["pool"]) as pool:
            await _count_exactly(pool)
            volumes = plain(pool.status())["volumes"]
            return JSONResponse([self._with_mirror(pool, volume) for volume in volumes])

    async def create_volume(self, request: Request) -> Response:
        body = await read_body(request, CreateVolumeBody)
        with self._pools.using(request.path_params["pool"]) as pool:
            if body.mirror:
                if body.filling:
                    raise TierError(errno.EINVAL, "filling: mirror a volume once it is complete")
                places = [place.place() for place in body.mirror]
                options = Options(body.timeout_s, body.lease_s, body.quorum, body.arbiter)
                await self._admin.create(pool, body.name, body.size, body.policy, places, options)
            else:
                await pool.create_volume(body.name, body.size, body.policy, filling=body.filling)
            return JSONResponse(self._volume(pool, body.name), HTTPStatus.CREATED)

    async def show_volume(self, request: Request) -> Response:
        name = request.path_params["volume"]
        with self._pools.using(request.path_params["pool"]) as pool:
            pool.volume(name)
            await _count_exactly(pool)
            return JSONResponse(self._volume(pool, name))

    async def resize_volume(self, request: Request) -> Response:
        body = await read_body(request, ResizeBody)
        name = request.path_params["volume"]
        with self._pools.using(request.path_params["pool"]) as pool:
            now_bytes = pool.volume(name).size_bytes
            require_shrink(f"{pool.name}/{name}", now_bytes, body)
            mirror = self._mirrors.of(pool.volume(name))
            if mirror is None:
                await pool.resize_volume(name, body.size)
            else:
                await self._admin.resize(mirror, body.size)
            return JSONResponse(self._volume(pool, name))

    async def delete_volume(self, request: Request) -> Response:
        snapshots, force = (request.query_params.get(key) in ("1", "true") for key in ("snapshots", "force"))
        with self._pools.using(request.path_params["pool"]) as pool:
            volume = pool.volume(request.path_params["volume"])
            if force and self._mirrors.is_broken(volume):
                return JSONResponse(await self._admin.delete_broken(pool, volume, snapshots=snapshots))
            mirror = self._mirrors.of(volume)
            if mirror is not None:
                return JSONResponse(await self._admin.delete(mirror, snapshots=snapshots, force=force))
            await self._snapshots.delete_volume(pool, request.path_params["volume"], snapshots=snapshots)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def set_policy(self, request: Request) -> Response:
        body = await read_body(request, PolicyBody)
        name = request.path_params["volume"]
        with self._pools.using(request.path_params["pool"]) as pool:
            await pool.set_policy(name, body.policy)
            return JSONResponse(self._volume(pool, name))

    async def set_filling(self, request: Request) -> Response:
        body = await read_body(request, FillingBody)
        name = request.path_params["volume"]
        with self._pools.using(request.path_params["pool"]) as pool:
            if body.filling:
                self._through.require_plain(
                    pool.volume(name),
                    "filled by a restore or an import, which would be for one leg only",
                    "fill a new volume, and mirror that: `terrace volume mirror add`",
                )
            await pool.set_filling(name, body.filling)
            return JSONResponse(self._volume(pool, name))

    async def show_heat(self, request: Request) -> Response:
        given = request.query_params.get("ranges", str(DEFAULT_RANGES))
        if not (given.isascii() and given.isdigit() and len(given) < 6 and 1 <= int(given) <= MAX_RANGES):
            raise TierError(errno.EINVAL, f"ranges: {given!r} is not possible; give a number from 1 to {MAX_RANGES}")
        with self._pools.using(request.path_params["pool"]) as pool:
            found = await pool.heat_map(request.path_params["volume"], int(given))
            return JSONResponse(dataclasses.asdict(found))

    def _summary(self, slot: Slot) -> dict[str, Any]:
        found = pool_summary(slot)
        if slot.pool is not None:
            found["volumes"] = [self._with_mirror(slot.pool, volume) for volume in found["volumes"]]
        return found

    def _volume(self, pool: Pool, volume_name: str) -> Any:
        """One volume's status. Raises ENOENT."""
        name = pool.volume(volume_name).name
        found = next(status for status in plain(pool.status())["volumes"] if status["name"] == name)
        return self._with_mirror(pool, found)

    def _with_mirror(self, pool: Pool, status: dict[str, Any]) -> dict[str, Any]:
        """With `mirror`: what is known here of the mirror that it is a leg of, or null; and with `mirror_problem`, a
        sentence, where it is a leg whose record can't be understood."""
        volume = pool.volume(status["name"].partition("/")[2])
        mirror, problem = None, None
        try:
            mirror = self._mirrors.of(volume)
        except OSError as error:  # which was told as an event
            problem = error.strerror
        known = self._mirrors.local_status(mirror) if mirror is not None else None
        return status | {"mirror": known, "mirror_problem": problem}

    def _tell(self, kind: str, subject: str, text: str) -> None:
        self._events.add(kind, subject, text)

    def _clients(self, export: str) -> list[str]:
        """Who is connected to an export, now."""
        connections = self._daemon.status(reset=False)["nbd"]["connections"]
        return [connection["peer"] for connection in connections if connection["export"] == export]

    async def list_snapshots(self, request: Request) -> Response:
        with_legs = request.query_params.get("legs") in ("1", "true")
        with self._pools.using(request.path_params["pool"]) as pool:
            volume = request.path_params.get("volume")
            pool.snapshots(volume)
            await _count_exactly(pool)
            found = await pool.snapshot_status(volume)
            if not with_legs:
                return await _long_list(found)
            names = [volume] if volume is not None else [one.short_name for one in pool.volumes()]
            return JSONResponse(await listed(self._through, pool, names, found))

    async def _take(self, pool: Pool, volumes: Sequence[str], body: WhereBody, name: str, *, by_filler: bool) -> Any:
        """What was taken, as JSON: a row for each volume, with who lacks it where that is mirrored."""
        taken, lacking = await self._snapshots.create(
            pool, volumes, name, by_filler=by_filler, local=body.local, force=body.force
        )
        rows = {one.name: plain(one) for one in taken}
        return [
            rows.get(f"{pool.name}/{volume}@{name}", {"name": f"{pool.name}/{volume}@{name}", "id": None})
            | {"lacking": dict(lacking.get(volume, {}))}
            for volume in volumes
        ]

    async def take_snapshots(self, request: Request) -> Response:
        body = await read_body(request, TakeBody)
        with self._pools.using(request.path_params["pool"]) as pool:
            rows = await self._take(pool, body.volumes, body, body.name, by_filler=False)
            return JSONResponse(rows, HTTPStatus.CREATED)

    async def take_snapshot(self, request: Request) -> Response:
        body = await read_body(request, TakeOneBody)
        with self._pools.using(request.path_params["pool"]) as pool:
            volume = request.path_params["volume"]
            (row,) = await self._take(pool, [volume], body, body.name, by_filler=body.by_filler)
            return JSONResponse(row, HTTPStatus.CREATED)

    async def show_snapshot(self, request: Request) -> Response:
        pool_name, volume, name = _snapshot_named(request)
        with self._pools.using(pool_name) as pool:
            self._snapshots.find(pool, volume, name)
            await _count_exactly(pool)
            found = await pool.snapshot_status(volume, name)
            if request.query_params.get("legs") not in ("1", "true"):
                return JSONResponse(plain(found[0]))
            return JSONResponse((await listed(self._through, pool, [volume], found))[0])

    async def change_snapshot(self, request: Request) -> Response:
        body = await read_body(request, ChangeSnapshotBody)
        pool_name, volume, name = _snapshot_named(request)
        with self._pools.using(pool_name) as pool:
            changed, left = await self._snapshots.change(
                pool, volume, name, new_name=body.name, held=body.held, local=body.local
            )
            return JSONResponse(plain(changed) | {"left": left})

    async def delete_snapshot(self, request: Request) -> Response:
        pool_name, volume, name = _snapshot_named(request)
        local = request.query_params.get("local") in ("1", "true")
        with self._pools.using(pool_name) as pool:
            await _count_exactly(pool)
            return JSONResponse(await self._snapshots.delete(pool, volume, name, local=local))

    async def roll_back(self, request: Request) -> Response:
        body = await read_body(request, RollbackBody)
        if body.keep_as is not None and not body.safety:
            raise TierError(errno.EINVAL, "keep_as: it names the safety snapshot, which is not wanted")
        pool_name, volume, name = _snapshot_named(request)
        with self._pools.using(pool_name) as pool:
            done = await self._snapshots.rollback(
                pool, volume, name, keep_as=body.keep_as, safety=body.safety, force=body.force
            )
            return JSONResponse(done | {"volume": self._volume(pool, volume)})

    async def clone_snapshot(self, request: Request) -> Response:
        body = await read_body(request, CloneBody)
        pool_name, volume, name = _snapshot_named(request)
        with self._pools.using(pool_name) as pool:
            await self._snapshots.clone(pool, volume, name, body.name, body.policy)
            return JSONResponse(self._volume(pool, body.name), HTTPStatus.CREATED)

    async def promote_volume(self, request: Request) -> Response:
        pool_name, name = request.path_params["pool"], request.path_params["volume"]
        self._pools.pool(pool_name).volume(name)  # refused with a status, as above

        async def promote(pool: Pool, progress: Progress) -> dict[str, Any]:
            await self._snapshots.promote(pool, name, progress)
            await _count_exactly(pool)
            return {"volume": self._volume(pool, name)}

        return Stream(self._pools.occupying(pool_name), pool_name, promote)

    async def list_policies(self, request: Request) -> Response:
        return JSONResponse(list(map(plain, self._definitions.show())))

    async def show_policy(self, request: Request) -> Response:
        return JSONResponse(plain(self._definitions.show_one(request.path_params["policy"])))

    async def reload_policies(self, request: Request) -> Response:
        return JSONResponse(plain(await self._definitions.reload()))

    async def show_upgrade(self, request: Request) -> Response:
        return JSONResponse(self._daemon.upgrade.status())

    async def begin_upgrade(self, request: Request) -> Response:
        body = await read_body(request, UpgradeBody)
        self._daemon.upgrade.request(force=body.force)
        return JSONResponse(self._daemon.upgrade.status(), 202)


def _snapshot_named(request: Request) -> tuple[str, str, str]:
    """Pool, volume and snapshot of the path."""
    pool, volume, snapshot = (request.path_params[part] for part in ("pool", "volume", "snapshot"))
    return pool, volume, snapshot


async def _scrub_of(pool: Pool) -> dict[str, Any]:
    """The newest scrub, and how much is lost: nothing of that is on the media any more, so no scrub finds it."""
    status = pool.scrubber.status()
    if status.state != "running":  # while it is this is asked for all the time, and what was known last will do
        await pool.losses()
    lost = [{"volume": name, "blocks": blocks} for name, blocks in pool.lost_blocks().items()]
    found: dict[str, Any] = plain(status)
    return found | {"lost": lost}


async def _evacuations(pool: Pool) -> dict[str, Any]:
    """How far they are, and all that is known to be lost now."""
    losses = [plain(loss) for loss in await pool.losses()]
    return {"evacuations": plain(pool.status())["evacuations"], "losses": losses, "given_up": pool.given_up}


async def _count_exactly(pool: Pool) -> None:
    """Mapped bytes are counted at checkpoints; people who ask mean now. A pool that can't tells its last count."""
    with suppress(OSError):
        await pool.checkpoint()


class _BoundedBody:
    """Refuses request bodies above BODY_LIMIT_BYTES, whether announced or not, before they are in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_bytes = 0

        async def bounded() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > BODY_LIMIT_BYTES:
                raise HTTPException(413, f"the body is larger than {format_size(BODY_LIMIT_BYTES)}")
            return message

        await self._app(scope, bounded, send)
