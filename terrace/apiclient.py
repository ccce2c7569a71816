"""The control API as its clients see it: a request, and an answer or an error that says what to do next."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

# Connecting is local and immediate. Answers take as long as the operation does.
_TIMEOUT = httpx.Timeout(None, connect=5.0)


class ApiError(OSError):
    """The daemon refused; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


class NotRunningError(ApiError):
    """No daemon answers at the home's API socket."""


class ApiClient:
    """A blocking client for one daemon. Every method raises ApiError."""

    def __init__(self, api_socket: Path) -> None:
        self._socket = api_socket
        # A look before the first request, for httpx doesn't keep the errno that tells why it could not connect.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(api_socket))
            except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
                home = api_socket.parent
                raise NotRunningError(
                    errno.ECONNREFUSED, f"no terraced runs on {home}; start one with: terraced --home {home}"
                ) from None
            except OSError as error:
                raise ApiError(
                    error.errno or errno.EIO, f"can't talk to {api_socket}: {error.strerror or error}; run as its owner"
                ) from None
        # A Unix socket has no certificates to verify; not loading them saves 50 ms a command.
        transport = httpx.HTTPTransport(uds=str(api_socket), verify=False)
        self._http = httpx.Client(transport=transport, base_url="http://terraced", timeout=_TIMEOUT)

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, *path: str, **query: str) -> Any:
        return self.request("GET", *path, query=query)

    def request(self, method: str, *path: str, body: object = None, query: dict[str, str] | None = None) -> Any:
        """The decoded answer to METHOD /v1/PATH; None where there is none. Parts of `path` are quoted."""
        try:
            response = self._http.request(method, _url(path), json=body, params=query)
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        if response.is_error:
            raise _refusal(response.content)
        return response.json() if response.content else None

    def stream(self, method: str, *path: str, body: object = None) -> Iterator[Any]:
        """Each line of an answer in JSON lines. Raises ApiError also for a line that is an error."""
        try:
            with self._http.stream(method, _url(path), json=body) as response:
                if response.is_error:
                    raise _refusal(response.read())
                for line in response.iter_lines():
                    content = json.loads(line)
                    if "error" in content:
                        raise _refusal(line.encode())
                    yield content
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def _lost(self, error: httpx.HTTPError) -> ApiError:
        reason = str(error) or type(error).__name__
        return ApiError(
            errno.ECONNRESET, f"terraced at {self._socket} went away before it answered ({reason}); see its log"
        )


def _url(path: tuple[str, ...]) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in path)


def _refusal(content: bytes) -> ApiError:
    try:
        body = json.loads(content)
        return ApiError(getattr(errno, str(body["errno"]), errno.EIO), str(body["error"]))
    except (ValueError, KeyError, TypeError):
        shown = content[:200].decode("utf-8", "replace")
        return ApiError(errno.EPROTO, f"terraced gave an answer that is none of its API: {shown!r}")
