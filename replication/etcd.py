"""The truth in etcd: a `ClusterStore` on the JSON gateway of etcd 3.4 and later, and the primary's lease there.

Two keys for each mirror: `PREFIX/MIRROR/membership`, the record, changed only by a transaction that compares its
mod_revision; and `PREFIX/MIRROR/primary`, the name of the primary, which goes with its etcd lease. Reads are etcd's
usual ones, which are linearizable: what is read is the newest that counts, whichever endpoint answers.

A record counts once it is in etcd; then it is stored at the legs that it has in sync, before `commit` returns. A
candidate takes the record of etcd and asks these legs for promises, which fences the primary before it; a new term is
refused (EBUSY) while another node's `primary` key exists.

A transaction whose answer is lost may have happened. It is tried again, at the next endpoint: if it had happened, the
comparison fails and the record that is there is the one that was to be written.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import trio

from replication.membership import Membership, decode, encode
from replication.voters import LegsCluster, judge_successor

PREFIX = "terrace/mirrors"


@dataclass(frozen=True)
class EtcdTls:
    """Files in PEM."""

    ca: Path | None = None
    """None: the system's."""
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises OSError: a file is missing, or isn't what it should be."""
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            raise OSError(errno.EINVAL, f"etcd's TLS files {self} can't be used: {error}") from None
        return context


class Etcd:
    """Calls to the JSON gateway, at whichever endpoint answers. Use `async with`."""

    def __init__(self, endpoints: Sequence[str], *, tls: EtcdTls | None = None, timeout_s: float = 2.0) -> None:
        """`endpoints`: http://HOST:PORT or https://HOST:PORT. `timeout_s`: of a call, tries at all endpoints included.

        Raises OSError EINVAL.
        """
        for endpoint in endpoints:
            url = httpx.URL(endpoint)
            if url.scheme not in ("http", "https") or not url.host:
                raise OSError(
                    errno.EINVAL, f"{endpoint!r} is no endpoint of etcd: give http://HOST:PORT or https://..."
                )
        if not endpoints:
            raise OSError(errno.EINVAL, "etcd needs at least one endpoint")
        self.timeout_s = timeout_s
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        # Proxies of the environment are meant for other traffic.
        self._client = httpx.AsyncClient(
            verify=tls.context() if tls else True, timeout=timeout_s / min(len(endpoints), 3), trust_env=False
        )

    async def __aenter__(self) -> Etcd:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises OSError ETIMEDOUT: it isn't known whether it has happened. EPROTO, EINVAL: it hasn't."""
        told: dict[str, str] = {}
        pause_s = 0.02
        with trio.move_on_after(self.timeout_s):
            while True:
                for endpoint in list(self._endpoints):
                    try:
                        return await self._once(endpoint, path, body)
                    except httpx.HTTPError as error:
                        told[endpoint] = str(error) or type(error).__name__
                        self._endpoints.remove(endpoint)
                        self._endpoints.append(endpoint)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.5)
        why = "; ".join(f"{endpoint}: {what}" for endpoint, what in sorted(told.items())) or "no answer"
        raise OSError(errno.ETIMEDOUT, f"etcd has not answered within {self.timeout_s:g} s ({why})")

    async def _once(self, endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._client.post(f"{endpoint}/v3/{path}", json=body)
        if response.status_code == httpx.codes.OK:
            try:
                plain = response.json()
            except ValueError:
                plain = None
            if not isinstance(plain, dict):
                raise OSError(errno.EPROTO, f"{endpoint} answers as etcd doesn't: {response.text[:80]!r}")
            return plain
        if response.status_code == httpx.codes.NOT_FOUND and "requested lease not found" in response.text:
            raise OSError(errno.ENOENT, "the lease has expired")
        if response.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND, httpx.codes.UNAUTHORIZED):
            raise OSError(errno.EINVAL, f"etcd at {endpoint} refuses {path}: {response.text[:200].strip()}")
        # No leader, too many requests, overload: another endpoint, or the same later, may do it.
        raise httpx.HTTPError(f"HTTP {response.status_code}: {response.text[:120].strip()}")


class EtcdCluster:
    """A `ClusterStore`."""

    def __init__(self, node: str, etcd: Etcd, legs: LegsCluster) -> None:
        self.node = node
        self._etcd = etcd
        self._legs = legs
        self._lease: str | None = None

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
        """Raises OSError ESTALE, EBUSY (a new term, and the primary's lease lasts), EINVAL, EUCLEAN, ETIMEDOUT."""
        judge_successor(new, expected)
        there, revision = await self._read(new.mirror)
        if there == expected:
            begins = new.term != expected.term and new.forced == "no"
            there = await self._swap(new, revision, unless_primary=begins) or new
        if there != new:
            now = f"{there.term.number}.{there.epoch}" if there else "none"
            raise OSError(
                errno.ESTALE, f"etcd has the record {now}, not {expected.term.number}.{expected.epoch}: others went on"
            )
        await self._legs.commit(new, expected=expected)

    async def _read(self, mirror: str) -> tuple[Membership | None, int]:
        """And its mod_revision, 0 if there is none."""
        answer = await self._etcd.call("kv/range", {"key": _key(mirror, "membership")})
        return _record(answer)

    async def _swap(self, new: Membership, revision: int, *, unless_primary: bool = False) -> Membership | None:
        """None: done. Else the record that is there instead."""
        key, holder = _key(new.mirror, "membership"), _key(new.mirror, "primary")
        compare = [{"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}]
        failure = [{"request_range": {"key": key}}, {"request_range": {"key": holder}}]
        if unless_primary:
            compare.append({"key": holder, "target": "CREATE", "result": "EQUAL", "create_revision": "0"})
        success = [{"request_put": {"key": key, "value": _base64(encode(new))}}]
        if unless_primary:
            # A candidate that was primary itself may have left its key behind.
            own = {"key": holder, "target": "VALUE", "result": "EQUAL", "value": _base64(self.node.encode())}
            delete = [{"request_delete_range": {"key": holder}}]
            await self._etcd.call("kv/txn", {"compare": [own], "success": delete})
        answer = await self._etcd.call("kv/txn", {"compare": compare, "success": success, "failure": failure})
        if answer.get("succeeded"):
            return None
        try:
            membership, primary = (one["response_range"] for one in answer["responses"])
        except (KeyError, TypeError, ValueError):
            raise OSError(errno.EPROTO, f"etcd's answer makes no sense: {str(answer)[:120]}") from None
        there, now = _record(membership)
        if now == revision and primary.get("kvs"):
            name = base64.b64decode(primary["kvs"][0]["value"]).decode(errors="replace")
            raise OSError(errno.EBUSY, f"node {name} is primary and alive by its lease in etcd; demote it, or wait")
        return there

    async def hold(self, mirror: str, lease_s: float) -> None:
        """Take, or keep, the primary's key; `lease_s` is rounded up to a second, and etcd's least is 2.

        The lease that the primary counts on (`replication.lease.PrimaryLease.renewed`) begins before this call. Raises
        OSError EBUSY: another node has it; ETIMEDOUT.
        """
        if self._lease is not None:
            answer = await self._etcd.call("lease/keepalive", {"ID": self._lease})
            if int(answer.get("result", {}).get("TTL", 0)) > 0:
                return
        granted = await self._etcd.call("lease/grant", {"TTL": str(math.ceil(lease_s))})
        lease, key, name = str(granted["ID"]), _key(mirror, "primary"), _base64(self.node.encode())
        put = [{"request_put": {"key": key, "value": name, "lease": lease}}]
        absent = {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        mine = {"key": key, "target": "VALUE", "result": "EQUAL", "value": name}
        for condition in (absent, mine):
            answer = await self._etcd.call("kv/txn", {"compare": [condition], "success": put})
            if answer.get("succeeded"):
                self._lease = lease
                return
        raise OSError(errno.EBUSY, f"another node is primary of mirror {mirror}, by its lease in etcd")

    async def release(self) -> None:
        """Give the key back: after a demotion, or when this node has stopped serving."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._etcd.call("lease/revoke", {"ID": lease})


def _key(mirror: str, what: str) -> str:
    return _base64(f"{PREFIX}/{mirror}/{what}".encode())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _record(answer: dict[str, Any]) -> tuple[Membership | None, int]:
    try:
        pairs = answer.get("kvs", [])
        if not pairs:
            return None, 0
        return decode(base64.b64decode(pairs[0]["value"])), int(pairs[0]["mod_revision"])
    except (KeyError, TypeError, ValueError, json.JSONDecodeError):
        raise OSError(errno.EPROTO, f"etcd's answer makes no sense: {str(answer)[:120]}") from None
