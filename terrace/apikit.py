"""What all handlers of the control API are made of: bodies that are judged, errors with a status, streams."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any, Generic, Protocol, TypeVar

import pydantic
import trio
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from terrace.schema import Size
from terrace.sizes import format_size
from tiers import TierError

log = logging.getLogger("terrace.api")

_PROGRESS_INTERVAL_S = 0.1
_REPEAT_S = 5.0

# What clients send


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResizeBody(Body):
    size: Size
    shrink: bool = False


class WhereBody(Body):
    local: bool = False
    force: bool = False


class TakeOneBody(WhereBody):
    name: str
    by_filler: bool = False


class TakeBody(WhereBody):
    name: str
    volumes: list[str] = Field(min_length=1, max_length=4096)


BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_body(request: Request, model: type[BodyT]) -> BodyT:
    """The request's body as a `model`; EINVAL naming the field that is wrong."""
    data = await request.body()
    try:
        return model.model_validate_json(data or b"{}")
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False)
        sentences = []
        for detail in details:
            where = ".".join(map(str, detail["loc"]))
            reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
            sentences.append(f"{where or 'the body'}: {reason}")
        raise TierError(errno.EINVAL, "; ".join(sentences)) from None


# What they get


_STATUS_OF_ERRNO = {
    errno.ENOENT: HTTPStatus.NOT_FOUND,
    errno.EEXIST: HTTPStatus.CONFLICT,
    errno.EBUSY: HTTPStatus.CONFLICT,
    errno.ENOTEMPTY: HTTPStatus.CONFLICT,
    errno.EINVAL: HTTPStatus.BAD_REQUEST,
    errno.EFBIG: HTTPStatus.BAD_REQUEST,
    errno.ENAMETOOLONG: HTTPStatus.BAD_REQUEST,
    errno.EACCES: HTTPStatus.FORBIDDEN,
    errno.EPERM: HTTPStatus.FORBIDDEN,
    errno.EROFS: HTTPStatus.FORBIDDEN,
    errno.ENOSPC: HTTPStatus.INSUFFICIENT_STORAGE,
    errno.ESHUTDOWN: HTTPStatus.SERVICE_UNAVAILABLE,
}
_ERRNO_OF_STATUS = {404: errno.ENOENT, 405: errno.ENOTSUP, 413: errno.EFBIG}


def error_body(error: OSError) -> dict[str, str]:
    text = str(error) if isinstance(error, TierError) else (error.strerror or str(error))
    return {"error": text, "errno": errno.errorcode.get(error.errno or errno.EIO, "EIO")}


def error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        number = _ERRNO_OF_STATUS.get(error.status_code, errno.EINVAL)
        sentence = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse({"error": sentence, "errno": errno.errorcode[number]}, error.status_code)
    if not isinstance(error, OSError):
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    refusal = error if isinstance(error, OSError) else internal_error(error)
    status = _STATUS_OF_ERRNO.get(refusal.errno or errno.EIO, HTTPStatus.INTERNAL_SERVER_ERROR)
    return JSONResponse(error_body(refusal), status)


def internal_error(error: Exception) -> OSError:
    return TierError(errno.EIO, f"internal error: {type(error).__name__}; please report it with the daemon's log")


def plain(status: Any) -> Any:
    """A dataclass as JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(status), default=str))


def require_shrink(name: str, now_bytes: int, body: ResizeBody) -> None:
    """Raises TierError EINVAL if a smaller size was not meant for sure."""
    if body.size < now_bytes and not body.shrink:
        raise TierError(
            errno.EINVAL,
            f"{name} has {format_size(now_bytes)}, and shrinking it to {format_size(body.size)} "
            "discards everything behind that for good; say --shrink if that is meant",
        )


Handler = Callable[[Request], Awaitable[Response]]
Progress = Callable[[int, int], None]
"""Takes how many bytes are done, and of how many."""


ThingT = TypeVar("ThingT")
WorkedT = TypeVar("WorkedT", contravariant=True)


class Work(Protocol[WorkedT]):
    """Something that may take hours; what it returns is the last line of the answer."""

    __name__: str

    async def __call__(self, thing: WorkedT, progress: Progress, /) -> dict[str, Any]: ...


class Stream(Response, Generic[ThingT]):
    """Does some long work and streams its progress as lines of JSON. A client that goes away cancels it."""

    media_type = "application/x-ndjson"

    def __init__(self, occupation: AbstractContextManager[ThingT], name: str, work: Work[ThingT]) -> None:
        """`occupation` is entered for as long as it takes; what that gives is given to `work`. `name`: for the log."""
        super().__init__()
        del self.headers["content-length"]
        self._occupation = occupation
        self._name = name
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        done = (0, 0)

        def progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal done
            done = (done_bytes, total_bytes)

        async def line(content: dict[str, Any], *, more: bool = True) -> None:
            body = json.dumps(content).encode() + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def report_progress() -> None:
            told, told_at = (0, 0), trio.current_time()
            while True:
                await trio.sleep(_PROGRESS_INTERVAL_S)
                # Again if there is nothing new: clients take silence for a daemon that is stuck.
                if done != told or trio.current_time() - told_at >= _REPEAT_S:
                    told, told_at = done, trio.current_time()
                    await line({"done_bytes": told[0], "total_bytes": told[1]})

        async def watch_client(scope: trio.CancelScope) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        result: dict[str, Any] | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report_progress)
            nursery.start_soon(watch_client, nursery.cancel_scope)
            try:
                with self._occupation as thing:
                    result = await self._work(thing, progress)
            except OSError as error:
                result = error_body(error)
            except Exception as error:
                log.error("%s of %s failed", self._work.__name__, self._name, exc_info=error)
                result = error_body(internal_error(error))
            nursery.cancel_scope.cancel()
        if result is not None:
            await line(result, more=False)


def route(method: str, path: str, handler: Handler) -> Route:
    """What the handler raises is answered with its status and its sentence."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException:
            raise
        except Exception as error:
            return error_response(request, error)

    return Route(path, endpoint, methods=[method])
