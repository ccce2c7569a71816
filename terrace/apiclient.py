"""The control API as its clients see it: a request, and an answer or an error that says what to do next.

An answer takes as long as the operation does, which may be hours, so time alone says nothing. Silence does: a request
that is silent for a while asks the daemon on another connection whether it lives, and gives up if that is silent too.
A stream is never silent for long, for the daemon sends progress or a repetition of it.
"""

from __future__ import annotations

import errno
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from terrace.lastchange import LastChange

_SILENCE_S = 20.0
"""Silence after which a request asks whether the daemon lives."""
_SLOW_S = 1.0
"""After that somebody who waits for a change is told that it isn't done yet."""
_PROBE_S = 10.0
"""What it gets to say so, and to take a connection at all."""


class ApiError(OSError):
    """The daemon refused; prints as its sentence alone."""

    def __str__(self) -> str:
        return str(self.args[1])


class NotRunningError(ApiError):
    """No daemon answers at the home's API socket."""


class StoppedWaitingError(KeyboardInterrupt):
    """Somebody no longer waits for the answer to a request that changes something: the daemon carries it out anyway."""

    def __init__(self, path: tuple[str, ...]) -> None:
        super().__init__()
        self.path = path
        """What was asked, without /v1."""


class ApiClient:
    """A blocking client for one daemon. Every method raises ApiError."""

    def __init__(
        self,
        api_socket: Path,
        *,
        slow: Callable[[tuple[str, ...]], None] | None = None,
        change: LastChange | None = None,
    ) -> None:
        """`slow` is called, once, with the path of a request that changes something and takes more than a second.

        `change` is told of each request that changes something.
        """
        self._socket = api_socket
        self._slow = slow
        self._change = change or LastChange()
        # A look before the first request, for httpx doesn't keep the errno that tells why it could not connect.
        self._pid = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                _connect(probe, str(api_socket))
                self._pid = _peer_pid(probe)
            except TimeoutError:
                raise self._silent(_PROBE_S) from None
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
        self._http = httpx.Client(transport=transport, base_url="http://terraced", timeout=None)

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
        changes = method != "GET" and not (isinstance(body, dict) and body.get("dry_run"))
        url = _url(path)
        if changes:
            self._change.begins(path)
        try:
            response = self._patiently(
                lambda: self._http.request(method, url, json=body, params=query), path if changes else None
            )
        except httpx.HTTPError as error:
            if changes:
                self._change.failed()
            raise self._lost(error) from None
        if changes and response.is_error:
            self._change.failed()
        elif changes:
            self._change.succeeded()
        if response.is_error:
            raise refusal(response.content)
        return response.json() if response.content else None

    def text(self, *path: str) -> str:
        """The answer to GET /v1/PATH where that isn't JSON."""
        try:
            response = self._patiently(lambda: self._http.get(_url(path)))
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        if response.is_error:
            raise refusal(response.content)
        return response.text

    def stream(self, method: str, *path: str, body: object = None) -> Iterator[Any]:
        """Each line of an answer in JSON lines. Raises ApiError also for a line that is an error."""
        silence_s = _SILENCE_S + _PROBE_S
        try:
            with self._http.stream(method, _url(path), json=body, timeout=silence_s) as response:
                if response.is_error:
                    raise refusal(response.read())
                for line in response.iter_lines():
                    content = json.loads(line)
                    if "error" in content:
                        raise refusal(line.encode())
                    yield content
        except httpx.TimeoutException:
            raise self._silent(silence_s) from None
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def _patiently(self, call: Callable[[], httpx.Response], change: tuple[str, ...] | None = None) -> httpx.Response:
        """What `call` returns or raises, however long it takes, as long as the daemon lives.

        `change`: the path, where it changes something. Raises StoppedWaitingError then in the place of
        KeyboardInterrupt.
        """
        outcome: queue.SimpleQueue[httpx.Response | Exception] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put(call())
            except Exception as error:
                outcome.put(error)

        try:
            threading.Thread(target=run, daemon=True).start()
            result = self._outcome(outcome, change)
        except KeyboardInterrupt:
            if change is None:
                raise
            raise StoppedWaitingError(change) from None
        if isinstance(result, Exception):
            raise result
        return result

    def _outcome(
        self, outcome: queue.SimpleQueue[httpx.Response | Exception], change: tuple[str, ...] | None
    ) -> httpx.Response | Exception:
        if change is not None and self._slow is not None:
            try:
                return outcome.get(timeout=_SLOW_S)
            except queue.Empty:
                self._slow(change)
        while True:
            try:
                return outcome.get(timeout=_SILENCE_S)
            except queue.Empty:
                self._require_alive()

    def _require_alive(self) -> None:
        """Any answer will do. One that went away is left to the request itself, which notices at once."""
        try:
            self._http.get("/v1/status", timeout=_PROBE_S)
        except httpx.TimeoutException:
            raise self._silent(_SILENCE_S + _PROBE_S) from None
        except httpx.HTTPError:
            return

    def _silent(self, silence_s: float) -> ApiError:
        who, step = "terraced", "see its log"
        if self._pid == 1:  # systemd listens for it, and it doesn't itself yet
            step = "`systemctl status terraced` tells"
        elif self._pid:
            who = f"terraced (process {self._pid})"
            step = (
                f"see its log; if `ps -o stat= {self._pid}` says T it was stopped, and `kill -CONT {self._pid}` helps"
            )
        return ApiError(
            errno.ETIMEDOUT,
            f"{who} at {self._socket} has not answered for {silence_s:.0f} s: it is still opening its pools, stopped, "
            f"or stuck; {step}",
        )

    def _lost(self, error: httpx.HTTPError) -> ApiError:
        reason = str(error) or type(error).__name__
        return ApiError(
            errno.ECONNRESET, f"terraced at {self._socket} went away before it answered ({reason}); see its log"
        )


def _connect(probe: socket.socket, path: str) -> None:
    """Connect; TimeoutError if nobody takes the connection. A backlog that is full says EAGAIN."""
    deadline_s = time.monotonic() + _PROBE_S
    probe.setblocking(False)
    while True:
        try:
            return probe.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise TimeoutError from None
            time.sleep(0.05)


def _peer_pid(connected: socket.socket) -> int:
    """The process that listens; unix(7), SO_PEERCRED."""
    pid: int = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _url(path: tuple[str, ...]) -> str:
    for part in path:
        if part in (".", ".."):  # a URL with these means another one
            raise ApiError(errno.ENOENT, f"{part!r} is no name: nothing is called so")
    return "/v1/" + "/".join(quote(part, safe="") for part in path)


def refusal(content: bytes) -> ApiError:
    """What a body with an error means."""
    try:
        body = json.loads(content)
        return ApiError(getattr(errno, str(body["errno"]), errno.EIO), str(body["error"]))
    except (ValueError, KeyError, TypeError):
        shown = content[:200].decode("utf-8", "replace")
        return ApiError(errno.EPROTO, f"terraced gave an answer that is none of its API: {shown!r}")
