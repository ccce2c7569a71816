"""etcd as the arbiter of mirrors: one client for the daemon, how it is with it, and what it has gone back from.

`[etcd]` says where it is. It may be absent, wrong or away: then the mirrors that need it say so, and everything else
goes on. Every `POLL_S` it is asked for something that only a well etcd with a quorum answers.

**Gone back.** Each answer carries etcd's revision, which only grows. HOME/etcd.json remembers the highest that was
seen; if a later one is lower, etcd was restored from a backup, and the revision with which it came back is its *floor*:
records up to there may be outdated, and nobody becomes primary by them here unless by force.

| etcd.json | |
|---|---|
| version | 1; another one is refused, as is what can't be understood: then the file is to be deleted by hand |
| seen | the highest revision |
| floor | see above; -1: none |

It is replaced whole, at most every `SAVE_S`, and at once when the floor has changed.
"""

from __future__ import annotations

import base64
import errno
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import trio

from replication.arbiter import FORGOTTEN, ArbitratedLease
from replication.cluster import ClusterStore
from replication.durable import replace_file
from replication.etcd import EtcdCluster, EtcdLease
from replication.membership import Membership
from replication.voters import LegsCluster
from terrace.config import EtcdConfig

if TYPE_CHECKING:
    from replication.etcdclient import Etcd

log = logging.getLogger("terraced")

POLL_S: Final = 2.0
SAVE_S: Final = 10.0
RENEWALS: Final = 4
"""So many in the time of one lease."""
RELEASE_S: Final = 1.0
FILE: Final = "etcd.json"
FORMAT_VERSION: Final = 1
UNCONFIGURED: Final = (
    "etcd is the arbiter of this mirror, and this node doesn't know where etcd is: write endpoints under [etcd] in its "
    "configuration, and restart terraced"
)


@dataclass(frozen=True)
class _Seen:
    """What is remembered of etcd's revisions."""

    seen: int = -1
    floor: int = -1


class Arbiter:
    """See the module. `run` has to be run. Implements `replication.etcd.EtcdCaller`."""

    def __init__(self, config: EtcdConfig, home: Path, node: str, tell: Callable[[str, str, str], None]) -> None:
        self.config = config
        self.node = node
        self._tell = tell
        self._etcd: Etcd | None = config.client(home) if config.endpoints else None
        self._file = home / FILE
        self._known: _Seen | None = None
        """None: not read yet, or it can't be."""
        self._saved = _Seen()
        self._saved_at = float("-inf")
        self._save_lock = trio.Lock()
        self.problem: str | None = "it wasn't asked yet"
        """Why it doesn't answer."""
        self._answers: bool | None = None
        """What was told last."""
        self.latency_s: float | None = None

    @property
    def configured(self) -> bool:
        return self._etcd is not None

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `Etcd.call`. EINVAL: there is no [etcd]. EPROTO: etcd.json can't be understood."""
        if self._etcd is None:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EINVAL, UNCONFIGURED)
        known = self._known or await self._load()
        answer = await self._etcd.call(path, body)
        if path.startswith("kv/"):
            await self._look_at(answer, known.seen)
        return answer

    async def _load(self) -> _Seen:
        found = await trio.to_thread.run_sync(_load, self._file)
        if self._known is None:
            self._known = self._saved = found
        return self._known

    async def _look_at(self, answer: dict[str, Any], seen: int) -> None:
        """`seen`: when the call began. Another one, which has overtaken it, may have seen more since."""
        header = answer.get("header")
        try:
            revision = int(header["revision"]) if isinstance(header, dict) else -1
        except (KeyError, TypeError, ValueError):
            revision = -1
        known = self._known
        if revision < 0 or known is None:
            return
        if revision < seen:
            self._known = _Seen(revision, max(known.floor, revision))
            self._tell(
                "etcd",
                "etcd",
                f"etcd has gone back from revision {seen} to {revision}: it was restored from a backup, or is another "
                "one. Until a mirror's primary has written there again, only force promotes another node",
            )
            await self._save()
        elif revision > known.seen:
            self._known = _Seen(revision, known.floor)

    async def _save(self) -> None:
        async with self._save_lock:
            known = self._known
            if known is None or known == self._saved:
                return
            await trio.to_thread.run_sync(_store, self._file, known)
            self._saved, self._saved_at = known, trio.current_time()

    # -- for mirrors -----------------------------------------------------------------------------------------------

    def cluster(self, legs: LegsCluster) -> ClusterStore:
        """Where records count."""
        return self._cluster(legs)

    def _cluster(self, legs: LegsCluster) -> EtcdCluster:
        floor = lambda: self._known.floor if self._known is not None else -1  # noqa: E731
        return EtcdCluster(self.node, self, legs, prefix=self.config.prefix, floor=floor)

    def held(self, mirror: str, lease_s: float) -> HeldLease:
        """The primary's lease of that mirror; it has to be kept up."""
        return HeldLease(EtcdLease(self.node, self, mirror, lease_s, prefix=self.config.prefix))

    async def forget(self, mirror: str, legs: LegsCluster) -> str | None:
        """The mirror is no more. A sentence if its keys are left."""
        try:
            await self._cluster(legs).forget(mirror)
        except OSError as error:
            prefix = f"{self.config.prefix}/{mirror}/"
            return f"its keys are still in etcd ({error.strerror}); delete them with: etcdctl del --prefix {prefix}"
        return None

    async def require(self) -> None:
        """Raises OSError with a sentence if it doesn't answer now."""
        key = base64.b64encode(f"{self.config.prefix}/".encode()).decode()
        begun = trio.current_time()
        try:
            await self.call("kv/range", {"key": key, "count_only": True})
        except OSError as error:
            self._became(error.strerror or str(error))
            raise
        self.latency_s = trio.current_time() - begun
        self._became(None)

    # -- how it is -------------------------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """The task."""
        try:
            while True:
                if self._etcd is not None:
                    with suppress(OSError):
                        await self.require()
                    if trio.current_time() - self._saved_at >= SAVE_S:
                        try:
                            await self._save()
                        except OSError as error:
                            log.warning("%s can't be written: %s", self._file, error)
                await trio.sleep(POLL_S)
        finally:
            with trio.CancelScope(shield=True):
                with suppress(OSError):
                    await self._save()
                if self._etcd is not None:
                    await self._etcd.__aexit__(None, None, None)
        raise AssertionError("it sleeps for ever")

    def _became(self, problem: str | None) -> None:
        before, self._answers = self._answers, problem is None
        self.problem = problem
        if self._answers is before:
            return
        if problem is None:
            self._tell("etcd", "etcd", f"etcd answers at {', '.join(self.config.endpoints)}")
        else:
            self._tell("etcd", "etcd", f"etcd is no arbiter now: {problem}")

    def status(self) -> dict[str, Any] | None:
        """JSON; None without [etcd]."""
        if self._etcd is None:
            return None
        return {
            "kind": "etcd",
            "endpoints": list(self.config.endpoints),
            "prefix": self.config.prefix,
            "user": self.config.user or None,
            "answers": self.problem is None,
            "problem": self.problem,
            "latency_s": self.latency_s if self.problem is None else None,
        }


class HeldLease(ArbitratedLease):
    """The primary's lease of one mirror: at etcd, kept up by `keep`, and by what its legs' nodes answer."""

    def __init__(self, key: EtcdLease) -> None:
        super().__init__(key.lease_s)
        self._key = key
        self._period_s = key.lease_s / RENEWALS
        self.problem: OSError | None = None
        """Why it wasn't renewed there last."""
        self.changing = trio.Lock()
        """Held by who writes a later term of this primary: a renewal by the record that it takes the place of would end
        this node as primary."""

    async def keep(self, newest: Callable[[], Membership], deposed: Callable[[OSError], None]) -> None:
        """The task: renew it until another term counts. Raises OSError EUCLEAN: etcd has forgotten."""
        while True:
            try:
                async with self.changing:
                    begun = self.begin()
                    await self._key.renew(newest())
            except OSError as error:
                self.problem = error
                if error.errno == FORGOTTEN:
                    raise
                if error.errno == errno.ESTALE:
                    deposed(error)
                    return
                await trio.sleep(min(0.1, self._period_s))
                continue
            self.problem = None
            self.renewed(begun)
            await trio.sleep(self._period_s)

    async def release(self) -> None:
        """This node has stopped serving: another one needn't wait. What can't be given back ends by itself."""
        if self.problem is not None:
            return  # who waits for us, a successor for instance, needn't wait for that
        with trio.move_on_after(RELEASE_S, shield=True), suppress(OSError):
            await self._key.release()


def _load(path: Path) -> _Seen:
    """Blocks. Raises OSError."""
    try:
        plain = json.loads(path.read_bytes())
        if plain["version"] == FORMAT_VERSION and type(plain["seen"]) is type(plain["floor"]) is int:
            return _Seen(plain["seen"], plain["floor"])
    except FileNotFoundError:
        return _Seen()
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise OSError(
        errno.EPROTO,
        f"{path}, which says how far etcd has been, can't be understood; if etcd was not restored from a backup "
        "lately, delete it",
    )


def _store(path: Path, known: _Seen) -> None:
    """Blocks. After a crash there is the old file or the new one; the new one after a return."""
    replace_file(path, json.dumps({"version": FORMAT_VERSION, **asdict(known)}).encode())
