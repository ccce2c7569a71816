"""etcd's JSON gateway over HTTP: one call at a time of many, at whichever endpoint answers.

A module of its own, since a daemon without etcd needn't load httpx.
"""

from __future__ import annotations

import errno
import json
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import trio

from replication.etcd import judge_endpoint


@dataclass(frozen=True)
class EtcdTls:
    """Files in PEM."""

    ca: Path | None = None
    """None: the system's."""
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Reads the files. Raises OSError: one is missing, or isn't what it should be."""
        for path in (self.ca, self.certificate, self.key):
            if path is not None:
                _read(path, secret=path == self.key)
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            files = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path is not None)
            raise OSError(errno.EINVAL, f"TLS to etcd: {files} can't be used: {error}") from None
        return context


@dataclass(frozen=True)
class EtcdLogin:
    """Who we are, where etcd asks for that."""

    user: str
    password_file: Path
    """Its first line."""

    def password(self) -> str:
        """Reads the file. Raises OSError."""
        return _read(self.password_file, secret=True).decode(errors="replace").partition("\n")[0].rstrip("\r")


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        if secret and path.stat().st_mode & stat.S_IROTH:
            raise OSError(errno.EINVAL, f"{path}, which [etcd] names, can be read by everybody: chmod o= {path}")
        return path.read_bytes()
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise
        # Whatever it is, the configuration is wrong; ENOENT would say something of a key.
        raise OSError(errno.EINVAL, f"{path}, which [etcd] names, can't be read: {error.strerror}") from None


class Etcd:
    """Calls to the JSON gateway, at whichever endpoint answers. Use `async with`."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: EtcdTls | None = None,
        login: EtcdLogin | None = None,
        timeout_s: float = 2.0,
    ) -> None:
        """`endpoints`: http://HOST:PORT or https://HOST:PORT. `timeout_s`: of a call, tries at all endpoints included.

        The files of `tls` and `login` are read when they are needed, and again after a call that has failed: new ones
        need no restart. Raises OSError EINVAL.
        """
        for endpoint in endpoints:
            judge_endpoint(endpoint)
        if not endpoints:
            raise OSError(errno.EINVAL, "etcd needs at least one endpoint")
        self.timeout_s = timeout_s
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._tls = tls or EtcdTls()
        self._login = login
        self._client: httpx.AsyncClient | None = None
        self._token: str | None = None
        """None: not asked for one yet. Empty: etcd wants none."""

    async def __aenter__(self) -> Etcd:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._forget_client()

    def judge_files(self) -> None:
        """Blocks. Raises OSError for a file of `tls` or `login` that can't be used."""
        self._tls.context()
        if self._login is not None:
            self._login.password()

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """See `EtcdCaller`. Raises OSError.

        ETIMEDOUT: it isn't known whether it has happened. All others: it hasn't. ENOENT: the lease; ENOSPC: etcd's
        quota; EACCES: who we are; EPROTO, EINVAL.
        """
        told: dict[str, str] = {}
        pause_s = 0.02
        with trio.move_on_after(self.timeout_s):
            while True:
                for endpoint in list(self._endpoints):
                    try:
                        return await self._at(endpoint, path, body)
                    except httpx.HTTPError as error:
                        told[endpoint] = _said(error)
                        self._endpoints.remove(endpoint)
                        self._endpoints.append(endpoint)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.5)
        await self._forget_client()
        why = "; ".join(f"{endpoint}: {told.get(endpoint, 'silent')}" for endpoint in sorted(self._endpoints))
        raise OSError(errno.ETIMEDOUT, f"etcd has not answered within {self.timeout_s:g} s ({why})")

    async def _at(self, endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._client is None:
            # The system's authorities are some hundred files.
            context = await trio.to_thread.run_sync(self._tls.context)
            share_s = 0.9 * self.timeout_s / min(len(self._endpoints), 3)
            # Proxies of the environment are meant for other traffic.
            self._client = self._client or httpx.AsyncClient(verify=context, timeout=share_s, trust_env=False)
        if self._login is not None and self._token is None:
            self._token = await self._authenticate(endpoint, self._login)
        used = self._token
        answer = await self._post(endpoint, path, body, used)
        if used and answer.status_code != httpx.codes.OK and _is_token_stale(answer.text):
            self._token = None
            raise httpx.HTTPError("the token has expired")  # another one is asked for at once
        return self._judged(endpoint, path, answer)

    async def _post(self, endpoint: str, path: str, body: dict[str, Any], token: str | None) -> httpx.Response:
        client = self._client
        if client is None:  # another call has failed meanwhile
            raise httpx.HTTPError("the connection was given up")
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": token} if token else {})
        request = client.build_request("POST", f"{endpoint}/v3/{path}", content=data, headers=headers)
        request.stream = _Body(data)
        try:
            return await client.send(request)
        except (trio.ClosedResourceError, trio.BrokenResourceError, RuntimeError) as error:
            # A client that was closed by a call beside this one, which it had not answered in time.
            said = "silent" if isinstance(error, trio.ClosedResourceError) else str(error) or type(error).__name__
            raise httpx.HTTPError(said) from None

    async def _authenticate(self, endpoint: str, login: EtcdLogin) -> str:
        password = await trio.to_thread.run_sync(login.password)
        answer = await self._post(endpoint, "auth/authenticate", {"name": login.user, "password": password}, None)
        if "authentication is not enabled" in answer.text:
            return ""
        token = self._judged(endpoint, "auth/authenticate", answer).get("token")
        if not isinstance(token, str):
            raise OSError(errno.EPROTO, f"{endpoint} gives no token for the user {login.user}")
        return token

    def _judged(self, endpoint: str, path: str, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code == httpx.codes.OK:
            try:
                plain = answer.json()
            except ValueError:
                plain = None
            if not isinstance(plain, dict):
                raise OSError(errno.EPROTO, f"{endpoint} answers as etcd doesn't: {answer.text[:80]!r}")
            return plain
        text = _message(answer)
        if "requested lease not found" in text:
            raise OSError(errno.ENOENT, "the lease has expired")
        if "database space exceeded" in text:
            raise OSError(
                errno.ENOSPC,
                f"etcd at {endpoint} has used up its quota and stores nothing more: compact and defragment it, then "
                "`etcdctl alarm disarm`",
            )
        if "authentication failed" in text or "user name is empty" in text:
            who = f"the user {self._login.user} with that password" if self._login is not None else "who has no name"
            self._token = None
            raise OSError(
                errno.EACCES, f"etcd at {endpoint} doesn't let in {who}: see user and password_file under [etcd]"
            )
        if "permission denied" in text:
            who = f"the user {self._login.user}" if self._login is not None else "a client without a name"
            raise OSError(
                errno.EACCES,
                f"etcd at {endpoint} gives {who} no right to its keys: it takes readwrite below the prefix",
            )
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
            raise OSError(errno.EINVAL, f"etcd at {endpoint} refuses {path}: {text}")
        # No leader, too many requests, overload: another endpoint, or the same later, may do it.
        raise httpx.HTTPError(f"HTTP {answer.status_code}: {text}")

    async def _forget_client(self) -> None:
        client, self._client, self._token = self._client, None, None
        if client is not None:
            with trio.CancelScope(shield=True):
                await client.aclose()


def _is_token_stale(text: str) -> bool:
    return "invalid auth token" in text or "revision in header is old" in text


def _said(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "silent"
    causes: list[BaseException] = []  # httpx wraps what the network said, and repeats its words or says nothing itself
    found: BaseException | None = error
    while found is not None:
        causes.append(found)
        found = found.__cause__ or found.__context__
    if any(isinstance(cause, trio.ClosedResourceError) for cause in causes):
        return "silent"  # the client was given up, by another request that it had not answered in time
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            if "ALERT" in (cause.reason or ""):
                return f"TLS: it doesn't take our certificate, or wants one ({cause.reason})"
            return f"TLS: {getattr(cause, 'verify_message', '') or cause.reason or cause}"
        if str(cause):
            return str(cause)
    return type(error).__name__


def _message(answer: httpx.Response) -> str:
    """What etcd says of an error, or the beginning of what isn't etcd's."""
    try:
        found = answer.json()
        text = found.get("message") or found.get("error")
        return str(text)[:200] if text else answer.text[:120].strip()
    except (ValueError, AttributeError):
        return answer.text[:120].strip() or "no reason given"


class _Body(httpx.AsyncByteStream):
    """What is sent. httpx's own is an asynchronous generator, which a cancelled call leaves for trio to complain of."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data, None
        if data is None:
            raise StopAsyncIteration
        return data
