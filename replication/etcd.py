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
import math
import re
from collections.abc import Callable
from typing import Any, Final, Protocol
from urllib.parse import SplitResult, urlsplit

from replication.arbiter import FORGOTTEN, forgotten
from replication.lineage import went_on_alone
from replication.membership import Membership, decode, encode
from replication.voters import LegsCluster, judge_successor

PREFIX: Final = "terrace/mirrors"


class EtcdCaller(Protocol):
    """What the rest of this module needs of `Etcd`."""

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST of /v3/PATH. Raises OSError; ETIMEDOUT: it may have happened all the same."""


def judge_endpoint(endpoint: str) -> SplitResult:
    """Raises OSError EINVAL with a sentence."""
    if "@" in endpoint:  # first: what follows shows the endpoint
        raise OSError(errno.EINVAL, "an endpoint of etcd has no user in it: give user and password_file")
    try:
        url = urlsplit(endpoint)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and url.path in ("", "/")
        sound = sound and url.port != 0 and not url.query and not url.fragment and not re.search(r"\s", endpoint)
    except ValueError:
        sound = False
    if not sound:
        raise OSError(errno.EINVAL, f"{endpoint!r} is no endpoint of etcd: write https://HOST:PORT")
    return url


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

    async def judge_candidate(self, mirror: str) -> None:
        """Raises OSError EUCLEAN where etcd has gone back, and its record may be outdated; ETIMEDOUT, EPROTO."""
        _, revision = await self._read(mirror)
        self._judge_floor(revision)

    def _judge_floor(self, revision: int) -> None:
        """Whether a new term may follow a record with that mod_revision."""
        if revision <= self._floor():
            raise OSError(
                FORGOTTEN,
                "etcd was restored from an older backup, as this node has seen, and may have lost a later record "
                "of this mirror: start the node that was primary last; or promote with --force, which may lose "
                "writes",
            )

    async def commit(self, new: Membership, *, expected: Membership) -> None:
        """Raises OSError ESTALE, EBUSY (a new term, and the primary's lease lasts), EINVAL, ETIMEDOUT.

        EUCLEAN: split brain, or etcd has an older record than `expected`, or none. By force that is written over.
        """
        judge_successor(new, expected)
        there, revision = await self._read(new.mirror)
        if there != new:
            _judge_there(self.node, there, new, expected)
            begins = new.term != expected.term and new.forced == "no"
            if begins:
                self._judge_floor(revision)
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
        unchanged = {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}
        failure = [{"request_range": {"key": key}}, {"request_range": {"key": holder}}]
        success: list[dict[str, Any]] = [{"request_put": {"key": key, "value": _base64(encode(new))}}]
        conditions: list[list[dict[str, Any]]] = [[]]
        if unless_primary:
            absent = {"key": holder, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
            # A candidate that is primary, or was, may have its key there. It is left: a lease that goes on must not be
            # without it, or another candidate's record gets in while that is relied upon.
            own = {"key": holder, "target": "VALUE", "result": "EQUAL", "value": _base64(self.node.encode())}
            conditions = [[absent], [own], [absent]]  # it may end in between
        elif new.forced != "no":
            success.append({"request_delete_range": {"key": holder}})
        for condition in conditions:
            compare = [unchanged, *condition]
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

        `newest` is the primary's record that counts. Raises OSError ESTALE: another term counts. EAGAIN: this node has
        begun a later one, of which it doesn't know that it counts. EBUSY: another node
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
            if went_on_alone(there, newest.term, self.node):
                # Nobody else's: whoever has begun it sees to it.
                raise OSError(
                    errno.EAGAIN,
                    f"this node has begun term {there.term.number}, and has not heard yet whether that counts",
                )
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
                "find out who has written it, delete it, and `terrace volume mirror promote --force`",
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
