"""Who may have which export over NBD: rules as the configuration gives them, and a pure decision over them.

A rule is for the exports whose names its pattern matches; the first in the file's order that does decides, and an
export that no rule matches is for everybody. The rule of a volume is that of its snapshots too, unless one before it
matches those: whoever locks a volume up means its past as well.

Who may not have an export isn't told that it exists: it is missing in the list and among the snapshots with which
another one can be compared, and asking for it gets the answer that any name gets which nothing has. The log says what
was refused and why, as long as nobody makes it too much.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import trio

from nbd.export import Client, Export, Exports, OffersContexts
from nbd.tls import Identity
from tiers.snapshot import DIFF_CONTEXT

log = logging.getLogger("terraced")

_TOLD: Final = 32
_TELLING_S: Final = 10.0
"""So many refusals are logged in so long a time; of others there is only the number."""
_SHOWN_LETTERS: Final = 200

ANY: Final = "any"
UNIX: Final = "unix"


@dataclass(frozen=True)
class Rule:
    """What holds for the exports that `pattern` matches."""

    pattern: str
    """An export's name, in which `*` stands for any characters."""
    read_only: bool = False
    addresses: tuple[str, ...] = (ANY,)
    """Networks, `unix` for those who come over the Unix socket, `any`."""
    subjects: tuple[str, ...] = (ANY,)
    """Patterns of what a certificate says of its holder, or `any`. They concern TCP only."""


@dataclass(frozen=True)
class Decision:
    """`refusal` is the reason, for the log; empty: allowed."""

    refusal: str = ""
    read_only: bool = False


def decide(rules: Sequence[Rule], export: str, client: Client) -> Decision:
    """Whether `client` may have the export of that name, and whether only for reading."""
    for rule in rules:
        if _matches(rule.pattern, export) or _matches(rule.pattern, export.partition("@")[0]):
            return Decision(_refusal(rule, client), rule.read_only)
    return Decision()


def _refusal(rule: Rule, client: Client) -> str:
    if ANY not in rule.addresses and not any(_is_within(client.address, network) for network in rule.addresses):
        return f'its address is none of those that [nbd.exports."{rule.pattern}"] allows'
    if ANY in rule.subjects or client.address is None:
        return ""
    if client.identity is None:
        return f'it showed no certificate that was verified, and [nbd.exports."{rule.pattern}"] names subjects'
    facts = facts_of(client.identity)
    if any(matches_subject(pattern, facts) for pattern in rule.subjects):
        return ""
    return f'its subject {facts[0]} is none of those that [nbd.exports."{rule.pattern}"] allows'


def facts_of(identity: Identity) -> list[str]:
    """What a pattern of subjects is compared with: the whole subject, each part of it, each alternative name."""
    return [identity.subject, *re.findall(r"(?:[^,+\\]|\\.)+", identity.subject), *identity.names]


def matches_subject(pattern: str, facts: Sequence[str]) -> bool:
    """Whether a pattern of subjects, other than `any`, is like one of `facts_of` somebody."""
    return any(_matches(_as_units(pattern), _as_units(fact)) for fact in facts)


def require_address(text: str) -> str:
    """An entry of `addresses`. Raises ValueError."""
    if text in (ANY, UNIX):
        return text
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f'"{text}" is no address: {error}; write one such as "10.1.2.3" or "fd00::/8", "{UNIX}" for the Unix '
            f'socket, or "{ANY}"'
        ) from None
    return text


def require_subject(text: str) -> str:
    """An entry of `subjects`. Raises ValueError for one that is like no part of a certificate."""
    if text != ANY and not any(sign in text for sign in "=:*"):
        raise ValueError(
            f'"{text}" is no subject: write one such as "CN={text or "NAME"}", "DNS:host.example" for an alternative '
            f'name, or "{ANY}"'
        )
    return text


def _is_within(address: str | None, network: str) -> bool:
    if address is None or network == UNIX:
        return address is None and network == UNIX
    # An address of the other family is in no network of this one.
    return ipaddress.ip_address(address) in _network(network)


@lru_cache(maxsize=1024)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


def _matches(pattern: str, text: str) -> bool:
    """In linear time: a client chooses the text, and what tries each place of each star can be kept busy for hours."""
    first, *others = pattern.split("*")
    if not others:
        return text == first
    *between, last = others
    at, end = len(first), len(text) - len(last)
    if at > end or not (text.startswith(first) and text.endswith(last)):
        return False
    for part in between:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _as_units(text: str) -> str:
    """With a NUL, which subjects never have, behind each character that a backslash takes its meaning from.

    So no star can end between the two: the comma of `CN=x\\,O=Test` must not be the one of `*,O=Test`.
    """
    return re.sub(r"\\.", "\\g<0>\0", text, flags=re.DOTALL)


class RuledExports:
    """Exports, as each client may see them; implements `nbd.export.Exports` over another one."""

    def __init__(self, exports: Exports, rules: Sequence[Rule]) -> None:
        self._exports = exports
        self._rules = tuple(rules)
        self._told_since = -math.inf
        self._told = 0

    def list(self, client: Client) -> list[tuple[str, str]]:
        """Those that the client may have."""
        found = self._exports.list(client)
        return [one for one in found if not decide(self._rules, one[0], client).refusal]

    async def acquire(self, name: str, client: Client) -> Export:
        """The export, or a view of it that is only for reading. The empty name is the only volume that it may have."""
        if not name:
            volumes = [found for found, _ in self.list(client) if "@" not in found]
            if len(volumes) != 1:
                raise FileNotFoundError(
                    errno.ENOENT,
                    f"there are {len(volumes)} volumes that you may have, so none is the default; name one",
                )
            name = volumes[0]
        decision = decide(self._rules, name, client)
        if decision.refusal:
            # As `PoolExports` has one: a shorter way would tell which names have a rule.
            await trio.lowlevel.checkpoint()
            self._tell(f"{client.peer}: {_shown(name)} is refused: {decision.refusal}")
            raise _no_such_export(name)
        try:
            export = await self._exports.acquire(name, client)
        except FileNotFoundError:
            raise _no_such_export(name) from None
        if decision.read_only and not export.read_only:
            return ReadOnlyView(export)
        volume, at, _ = export.name.partition("@")
        if at and isinstance(export, OffersContexts):
            return SnapshotView(export, lambda other: not decide(self._rules, f"{volume}@{other}", client).refusal)
        return export

    def _tell(self, line: str) -> None:
        """A client may ask a thousand times in one handshake, and must not fill the log."""
        now = trio.current_time()
        if now >= self._told_since + _TELLING_S:
            left_out = self._told - _TOLD
            if left_out > 0:
                log.warning("%d more requests for exports were refused by rules since then", left_out)
            self._told_since, self._told = now, 0
        self._told += 1
        if self._told <= _TOLD:
            log.warning("%s", line)

    def identity(self, export: Export) -> str:
        """That of the export itself: whether it may be written is asked each time that it is acquired."""
        return self._exports.identity(export.whole if isinstance(export, ReadOnlyView) else export)

    def release(self, export: Export) -> None:
        self._exports.release(export.whole if isinstance(export, ReadOnlyView) else export)


def _shown(name: str) -> str:
    """What a client calls an export, fit for a log: it may be anything."""
    short = name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..."
    return short if short.isprintable() else repr(short)


def _no_such_export(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, f"there is no export {name!r} that you may have")


class ReadOnlyView:
    """An export for a client that may only read it. What reads is the export's own; size and the like may change."""

    read_only: Final = True

    def __init__(self, whole: Export) -> None:
        self.whole = whole
        # Bound methods of the export itself: a read costs what it costs without a rule. What it offers besides, such as
        # metadata contexts, are attributes of this object too: since Python 3.12 `isinstance` looks nowhere else.
        for name in dir(type(whole)):
            if not name.startswith("_") and not hasattr(type(self), name) and callable(getattr(type(whole), name)):
                setattr(self, name, getattr(whole, name))

    name = property(lambda self: self.whole.name)
    description = property(lambda self: self.whole.description)
    size_bytes = property(lambda self: self.whole.size_bytes)
    rotational = property(lambda self: self.whole.rotational)
    can_multi_conn = property(lambda self: self.whole.can_multi_conn)
    minimum_block_size = property(lambda self: self.whole.minimum_block_size)
    preferred_block_size = property(lambda self: self.whole.preferred_block_size)
    maximum_payload = property(lambda self: self.whole.maximum_payload)

    # The server refuses these before they get here (`nbd.transmission.judge`).

    def write_now(self, writes: Sequence[tuple[int, memoryview]]) -> bool:
        raise self._refused()

    def trim_now(self, ranges: Sequence[tuple[int, int]]) -> bool:
        raise self._refused()

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        raise self._refused()

    async def trim(self, offset: int, length: int) -> None:
        raise self._refused()

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool) -> None:
        raise self._refused()

    def _refused(self) -> OSError:
        return OSError(errno.EPERM, f"{self.name} is only for reading, by a rule under [nbd.exports]")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class SnapshotView(ReadOnlyView):
    """A snapshot for a client that may not have all others of the volume, and so isn't told of them either."""

    whole: Any

    def __init__(self, whole: Any, may_have: Callable[[str], bool]) -> None:
        """``may_have``: whether the client may have the snapshot of that name."""
        super().__init__(whole)
        self._may_have = may_have

    def contexts(self, prefix: str) -> Iterable[str]:
        return (context for context in self.whole.contexts(prefix) if self._is_open(context))

    def has_context(self, name: str) -> bool:
        return self._is_open(name) and self.whole.has_context(name)

    async def context_extents(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        if not self._is_open(context):  # selected before the daemon was replaced by one with other rules
            raise FileNotFoundError(errno.ENOENT, f"{self.name} offers no {context!r}")
        found: list[tuple[int, int]] = await self.whole.context_extents(context, offset, length, limit)
        return found

    def _is_open(self, context: str) -> bool:
        return not context.startswith(DIFF_CONTEXT) or self._may_have(context[len(DIFF_CONTEXT) :])
