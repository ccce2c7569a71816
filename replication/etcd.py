"""The truth in etcd: a `ClusterStore` on the JSON gateway of etcd 3.4 and later, and the primary's lease there.

Two keys for each mirror: `PREFIX/MIRROR/membership`, the record, changed only by a transaction that compares its
mod_revision; and `PREFIX/MIRROR/primary`, the name of the primary, which goes with its etcd lease. Reads are etcd's
usual ones, which are linearizable: what is read is the newest that counts, whichever endpoint answers.

A record counts once it is in etcd and, after that, at the legs that it has in sync, when `commit` returns. A candidate
takes the record of etcd and asks these legs for promises, which fences the primary before it; a new term is refused
(EBUSY) while another node's `primary` key exists.

**Why nothing is lost.** What a primary has acknowledged is at all legs that its record has in sync, and that record was
in etcd before. A candidate needs the promise of a leg that etcd's record has in sync *now*, and its own record gets
into etcd only if that one is there still. So what was acknowledged before the promise is at that leg; and after it
nothing can be, since that needs either the leg, which is fenced, or a record without it, for which it is too late.

A transaction whose answer is lost may have happened. It is tried again, at the next endpoint: if it had happened, the
comparison fails and the record that is there is the one that was to be written. A primary may write over a record of
its own term whose fate it doesn't know.

**etcd that has forgotten** (lost its data, or was restored from an older backup) is told by legs that have a later
record than it has, since each record is there before it is anywhere else. Then nothing is written over it but by force.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import httpx
import trio

from replication.arbiter import FORGOTTEN, forgotten
from replication.membership import Membership, decode, encode
from replication.voters import LegsCluster, judge_successor

PREFIX: Final = "terrace/mirrors"


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
                _read(path)
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
        return _read(self.password_file).decode(errors="replace").partition("\n")[0].rstrip("\r")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        # Whatever it is, the configuration is wrong; ENOENT would say something of a key.
        raise OSError(errno.EINVAL, f"{path}, which [etcd] names, can't be read: {error.strerror}") from None


class EtcdCaller(Protocol):
    """What the rest of this module needs of `Etcd`."""

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST of /v3/PATH. Raises OSError; ETIMEDOUT: it may have happened all the same."""


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
            # A client that was closed by a call beside this one.
            raise httpx.HTTPError(str(error) or type(error).__name__) from None

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


def judge_endpoint(endpoint: str) -> httpx.URL:
    """Raises OSError EINVAL with a sentence."""
    try:
        url = httpx.URL(endpoint)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.userinfo or "@" in endpoint:  # first: what follows shows the endpoint
        raise OSError(errno.EINVAL, "an endpoint of etcd has no user in it: give user and password_file")
    if url.scheme not in ("http", "https") or not url.host or url.path not in ("", "/") or url.query or url.fragment:
        raise OSError(errno.EINVAL, f"{endpoint!r} is no endpoint of etcd: write https://HOST:PORT")
    return url


def _is_token_stale(text: str) -> bool:
    return "invalid auth token" in text or "revision in header is old" in text


def _said(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "silent"
    found: BaseException | None = error
    while found is not None:  # httpx wraps what the network said, and says nothing itself
        if isinstance(found, ssl.SSLError):
            return f"TLS: {getattr(found, 'verify_message', '') or found.reason or found}"
        if str(found):
            return str(found)
        found = found.__cause__ or found.__context__
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


class EtcdCluster:
    """A `ClusterStore`."""

    def __init__(
        self,
        node: str,
        etcd: EtcdCaller,
        legs: LegsCluster,
        *,
        prefix: str = PREFIX,
        floor: Callable[[], int] = lambda: -1,
    ) -> None:
        """`floor`: a record with a mod_revision up to that one may be outdated, as etcd has gone back to there."""
        self.node = node
        self._floor = floor
        self._etcd = etcd
        self._legs = legs
        self._keys = _Keys(prefix)

    async def newest(self, mirror: str) -> Membership:
        """Raises OSError ENOENT, ETIMEDOUT, EPROTO."""
        found, _ = await self._read(mirror)
        if found is None:
            raise OSError(errno.ENOENT, f"etcd knows nothing of a mirror {mirror}")
        return found

    async def create(self, first: Membership) -> None:
        """Raises OSError EEXIST, ETIMEDOUT."""
        there = await self._swap(first, 0)
        if there is not None and there != first:
            raise OSError(errno.EEXIST, f"etcd has a mirror {first.mirror} already")
        await self._legs.create(first)

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        """Raises OSError ESTALE, EBUSY (a new term, and the primary's lease lasts), EINVAL, ETIMEDOUT.

        EUCLEAN: split brain, or etcd has an older record than `expected`, or none. By force that is written over.
        """
        judge_successor(new, expected)
        there, revision = await self._read(new.mirror)
        if there != new:
            _judge_there(self.node, there, new, expected)
            begins = new.term != expected.term and new.forced == "no"
            if begins and revision <= self._floor():
                raise OSError(
                    FORGOTTEN,
                    "etcd was restored from an older backup, as this node has seen, and may have lost a later record "
                    "of this mirror: start the node that was primary last; or promote with --force, which may lose "
                    "writes",
                )
            there = await self._swap(new, revision, unless_primary=begins)
            if there is not None and there != new:
                raise _others(there, expected)
        try:
            await self._legs.commit(new, expected=expected)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # A leg has promised another node a term. Only etcd says who goes on, and there this record is the newest.
            raise OSError(errno.ETIMEDOUT, error.strerror) from None

    async def forget(self, mirror: str) -> None:
        """The mirror is no more: neither are its keys. Raises OSError."""
        begin, end = f"{self._keys.prefix}/{mirror}/", f"{self._keys.prefix}/{mirror}0"
        body = {"key": _base64(begin.encode()), "range_end": _base64(end.encode())}
        await self._etcd.call("kv/deleterange", body)

    async def _read(self, mirror: str) -> tuple[Membership | None, int]:
        """And its mod_revision, 0 if there is none."""
        answer = await self._etcd.call("kv/range", {"key": self._keys.of(mirror, "membership")})
        return self._keys.record(answer, mirror)

    async def _swap(self, new: Membership, revision: int, *, unless_primary: bool = False) -> Membership | None:
        """None: done. Else the record that is there instead."""
        key, holder = self._keys.of(new.mirror, "membership"), self._keys.of(new.mirror, "primary")
        compare = [{"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}]
        failure = [{"request_range": {"key": key}}, {"request_range": {"key": holder}}]
        success: list[dict[str, Any]] = [{"request_put": {"key": key, "value": _base64(encode(new))}}]
        if unless_primary:
            compare.append({"key": holder, "target": "CREATE", "result": "EQUAL", "create_revision": "0"})
            # A candidate that was primary itself may have left its key behind.
            own = {"key": holder, "target": "VALUE", "result": "EQUAL", "value": _base64(self.node.encode())}
            delete = [{"request_delete_range": {"key": holder}}]
            await self._etcd.call("kv/txn", {"compare": [own], "success": delete})
        elif new.forced != "no":
            success.append({"request_delete_range": {"key": holder}})
        answer = await self._etcd.call("kv/txn", {"compare": compare, "success": success, "failure": failure})
        if answer.get("succeeded"):
            return None
        membership, primary = _ranges(answer, 2)
        there, now = self._keys.record(membership, new.mirror)
        if now == revision and primary.get("kvs"):
            name = _value(primary).decode(errors="replace")
            raise OSError(
                errno.EBUSY,
                f"node {name[:64]} is primary and alive by its lease in etcd; demote it, or wait until it ends",
            )
        if there is None:
            raise OSError(FORGOTTEN, f"etcd has lost the record of mirror {new.mirror} just now")
        return there


def _judge_there(node: str, there: Membership | None, new: Membership, expected: Membership) -> None:
    """Whether `new` may be written over what etcd has. Raises OSError."""
    forced = new.forced != "no"
    if there is None:
        if not forced:
            raise OSError(FORGOTTEN, forgotten(None, {node: expected}))
    elif there.place < expected.place:
        if not forced:
            raise OSError(FORGOTTEN, forgotten(there, {node: expected}))
    elif there != expected and not (there.place < new.place and (forced or there.term == new.term)):
        raise _others(there, expected)


def _others(there: Membership, expected: Membership) -> OSError:
    return OSError(
        errno.ESTALE,
        f"etcd has the record {there.term.number}.{there.epoch}, not {expected.term.number}.{expected.epoch}: "
        "others went on",
    )


class EtcdLease:
    """The `primary` key of one mirror, while this node is its primary."""

    def __init__(self, node: str, etcd: EtcdCaller, mirror: str, lease_s: float, *, prefix: str = PREFIX) -> None:
        """`lease_s` is rounded up to a second, and etcd's least is 2."""
        self.node = node
        self.mirror = mirror
        self.lease_s = lease_s
        self._etcd = etcd
        self._keys = _Keys(prefix)
        self._lease: str | None = None

    async def renew(self, newest: Membership) -> None:
        """Take, or keep, the key, for a lease from the beginning of this call on; see `replication.lease`.

        `newest` is the primary's record that counts. Raises OSError ESTALE: another term counts. EBUSY: another node
        has the key. EUCLEAN: etcd has forgotten. ETIMEDOUT and all that `Etcd.call` raises.
        """
        if self._lease is not None and not await self._is_alive(self._lease):
            self._lease = None
        if self._lease is not None and await self._is_held(self._lease, newest):
            return
        if self._lease is None:
            granted = await self._etcd.call("lease/grant", {"TTL": str(math.ceil(self.lease_s))})
            self._lease = _text(granted, "ID")
        await self._take(self._lease, newest)

    async def _is_alive(self, lease: str) -> bool:
        answer = await self._etcd.call("lease/keepalive", {"ID": lease})
        result = answer.get("result")
        return isinstance(result, dict) and _number(result, "TTL") > 0

    async def _is_held(self, lease: str, newest: Membership) -> bool:
        key, holder = self._keys.of(self.mirror, "membership"), self._keys.of(self.mirror, "primary")
        ours = {"key": holder, "target": "LEASE", "result": "EQUAL", "lease": lease}
        read = [{"request_range": {"key": key}}]
        answer = await self._etcd.call("kv/txn", {"compare": [ours], "success": read, "failure": read})
        there, _ = self._keys.record(_ranges(answer, 1)[0], self.mirror)
        self._judge(there, newest)
        return bool(answer.get("succeeded"))

    async def _take(self, lease: str, newest: Membership) -> None:
        key, holder = self._keys.of(self.mirror, "membership"), self._keys.of(self.mirror, "primary")
        name = _base64(self.node.encode())
        answer = await self._etcd.call("kv/range", {"key": key})
        there, revision = self._keys.record(answer, self.mirror)
        self._judge(there, newest)
        unchanged = {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}
        absent = {"key": holder, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        mine = {"key": holder, "target": "VALUE", "result": "EQUAL", "value": name}  # of the process before this one
        put = [{"request_put": {"key": holder, "value": name, "lease": lease}}]
        for condition in (absent, mine):
            answer = await self._etcd.call("kv/txn", {"compare": [condition, unchanged], "success": put})
            if answer.get("succeeded"):
                return
        raise OSError(errno.EBUSY, f"another node is primary of mirror {self.mirror}, by its lease in etcd")

    def _judge(self, there: Membership | None, newest: Membership) -> None:
        if there is None or there.place < newest.place:
            raise OSError(FORGOTTEN, forgotten(there, {self.node: newest}))
        if there.term != newest.term:
            raise OSError(
                errno.ESTALE,
                f"node {there.primary or 'nobody'} is primary by the record {there.term.number}.{there.epoch} in etcd",
            )

    async def release(self) -> None:
        """Give the key back: after a demotion, or when this node has stopped serving. Raises OSError."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._etcd.call("lease/revoke", {"ID": lease})


class _Keys:
    """Names, and what is under them."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.rstrip("/")

    def of(self, mirror: str, what: str) -> str:
        return _base64(f"{self.prefix}/{mirror}/{what}".encode())

    def record(self, answer: dict[str, Any], mirror: str) -> tuple[Membership | None, int]:
        """The record in the answer to a range, and its mod_revision; (None, 0) if there is none. Raises OSError."""
        if not answer.get("kvs"):
            return None, 0
        try:
            found = decode(_value(answer))
            if found.mirror != mirror:
                raise OSError(errno.EPROTO, f"it is of another mirror, {found.mirror[:64]}")
            return found, _number(answer["kvs"][0], "mod_revision")
        except OSError as error:
            raise OSError(
                errno.EPROTO,
                f"the key {self.prefix}/{mirror}/membership in etcd has no record of this mirror: {error.strerror}; "
                "find out who has written it, delete it, and `mirror promote --force`",
            ) from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _senseless(answer: object) -> OSError:
    return OSError(errno.EPROTO, f"etcd's answer makes no sense: {str(answer)[:120]}")


def _value(answer: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(answer["kvs"][0].get("value", ""))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise _senseless(answer) from None


def _number(plain: Any, key: str) -> int:
    """Those of 64 bits are strings in the gateway's JSON; zeros are left out."""
    try:
        return int(plain.get(key, 0))
    except (TypeError, ValueError, AttributeError):
        raise _senseless(plain) from None


def _text(plain: dict[str, Any], key: str) -> str:
    if not isinstance(plain.get(key), str):
        raise _senseless(plain)
    return str(plain[key])


def _ranges(answer: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What the ranges in a transaction have found. Raises OSError EPROTO."""
    try:
        found = [one["response_range"] for one in answer["responses"]]
    except (KeyError, TypeError):
        raise _senseless(answer) from None
    if len(found) != count or not all(isinstance(one, dict) for one in found):
        raise _senseless(answer)
    return found
