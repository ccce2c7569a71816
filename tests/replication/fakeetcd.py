"""etcd in memory, as far as `replication.etcd` uses it: revisions, transactions, and leases by trio's clock.

It is verified: `test_fake_etcd_cluster.py` has it keep the contract that the real one keeps.
"""

from __future__ import annotations

import base64
import errno
from dataclasses import dataclass
from typing import Any

import trio

LEAST_TTL_S = 2


@dataclass
class _Value:
    value: str
    mod: int
    created: int
    lease: int


class FakeEtcd:
    """An `EtcdCaller`. `is_cut`: nobody is answered, and nothing happens."""

    def __init__(self) -> None:
        self.is_cut = False
        self._revision = 1
        self._values: dict[str, _Value] = {}
        self._leases: dict[int, tuple[float, float]] = {}
        """TTL, and when it ends."""
        self._last_lease = 1000

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.is_cut:
            raise OSError(errno.ETIMEDOUT, "etcd has not answered within 0 s (fake: silent)")
        return self.do(path, body)

    def do(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """In one step."""
        self._expire()
        answer = {
            "kv/range": self._range,
            "kv/put": self._put,
            "kv/deleterange": self._delete,
            "kv/txn": self._transaction,
            "lease/grant": self._grant,
            "lease/keepalive": self._keep_alive,
            "lease/revoke": self._revoke,
        }[path](body)
        return {"header": {"revision": str(self._revision)}, **answer}

    def _expire(self) -> None:
        now = trio.current_time()
        for lease in [lease for lease, (_, end) in self._leases.items() if end <= now]:
            self._drop(lease)

    def _drop(self, lease: int) -> None:
        del self._leases[lease]
        gone = [key for key, value in self._values.items() if value.lease == lease]
        for key in gone:
            del self._values[key]
        self._revision += bool(gone)

    def _range(self, body: dict[str, Any]) -> dict[str, Any]:
        found = self._values.get(body["key"])
        if found is None:
            return {}
        plain = {"key": body["key"], "value": found.value, "mod_revision": str(found.mod)}
        return {"kvs": [plain | ({"lease": str(found.lease)} if found.lease else {})], "count": "1"}

    def _put(self, body: dict[str, Any]) -> dict[str, Any]:
        self._revision += 1
        before = self._values.get(body["key"])
        created = before.created if before is not None else self._revision
        self._values[body["key"]] = _Value(body["value"], self._revision, created, int(body.get("lease", 0)))
        return {}

    def _delete(self, body: dict[str, Any]) -> dict[str, Any]:
        begin = base64.b64decode(body["key"])
        end = base64.b64decode(body["range_end"]) if "range_end" in body else begin + b"\0"
        gone = [key for key in self._values if begin <= base64.b64decode(key) < end]
        for key in gone:
            del self._values[key]
        self._revision += bool(gone)
        return {"deleted": str(len(gone))}

    def _transaction(self, body: dict[str, Any]) -> dict[str, Any]:
        succeeded = all(self._holds(one) for one in body.get("compare", []))
        does = {
            "request_range": ("response_range", self._range),
            "request_put": ("response_put", self._put),
            "request_delete_range": ("response_delete_range", self._delete),
        }
        responses = []
        for one in body.get("success" if succeeded else "failure", []):
            (kind, request), *_ = one.items()
            name, do = does[kind]
            responses.append({name: do(request)})
        return {"responses": responses} | ({"succeeded": True} if succeeded else {})

    def _holds(self, one: dict[str, Any]) -> bool:
        found = self._values.get(one["key"])
        assert one["result"] == "EQUAL"
        match one["target"]:
            case "MOD":
                return (found.mod if found else 0) == int(one["mod_revision"])
            case "CREATE":
                return (found.created if found else 0) == int(one["create_revision"])
            case "LEASE":
                return found is not None and found.lease == int(one["lease"])
            case "VALUE":
                return found is not None and found.value == one["value"]
        raise AssertionError(one)

    def _grant(self, body: dict[str, Any]) -> dict[str, Any]:
        self._last_lease += 1
        ttl_s = max(float(body["TTL"]), LEAST_TTL_S)
        self._leases[self._last_lease] = ttl_s, trio.current_time() + ttl_s
        return {"ID": str(self._last_lease), "TTL": f"{ttl_s:g}"}

    def _keep_alive(self, body: dict[str, Any]) -> dict[str, Any]:
        lease = int(body["ID"])
        if lease not in self._leases:
            return {"result": {"ID": body["ID"]}}
        ttl_s, _ = self._leases[lease]
        self._leases[lease] = ttl_s, trio.current_time() + ttl_s
        return {"result": {"ID": body["ID"], "TTL": f"{ttl_s:g}"}}

    def _revoke(self, body: dict[str, Any]) -> dict[str, Any]:
        if int(body["ID"]) not in self._leases:
            raise OSError(errno.ENOENT, "the lease has expired")
        self._drop(int(body["ID"]))
        return {}
