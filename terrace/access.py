"""Who may have which export over NBD: rules as the configuration gives them, and a pure decision over them.

A rule is for the exports whose names its pattern matches; the first in the file's order that does decides, and an
export that no rule matches is for everybody. The rule of a volume is that of its snapshots too, unless one before it
matches those: whoever locks a volume up means its past as well.

Who may not have an export isn't told that it exists: it is missing in the list, and asking for it gets the answer that
any name gets which nothing has. The log says what was refused and why.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from nbd.export import Client, Export, Exports
from nbd.tls import Identity

log = logging.getLogger("terraced")

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
    if any(_matches(pattern, fact) for pattern in rule.subjects for fact in facts):
        return ""
    return f'its subject {facts[0]} is none of those that [nbd.exports."{rule.pattern}"] allows'


def facts_of(identity: Identity) -> list[str]:
    """What a pattern of subjects is compared with: the whole subject, each part of it, each alternative name."""
    return [identity.subject, *re.findall(r"(?:[^,+\\]|\\.)+", identity.subject), *identity.names]


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


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Callable[[str], object]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL).fullmatch


def _matches(pattern: str, text: str) -> bool:
    return _compiled(pattern)(text) is not None


class RuledExports:
    """Exports, as each client may see them; implements `nbd.export.Exports` over another one."""

    def __init__(self, exports: Exports, rules: Sequence[Rule]) -> None:
        self._exports = exports
        self._rules = tuple(rules)

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
            log.warning("%s: %s is refused: %s", client.peer, name, decision.refusal)
            raise _no_such_export(name)
        try:
            export = await self._exports.acquire(name, client)
        except FileNotFoundError:
            raise _no_such_export(name) from None
        return ReadOnlyView(export) if decision.read_only and not export.read_only else export

    def identity(self, export: Export) -> str:
        """That of the export itself: whether it may be written is asked each time that it is acquired."""
        return self._exports.identity(export.whole if isinstance(export, ReadOnlyView) else export)

    def release(self, export: Export) -> None:
        self._exports.release(export.whole if isinstance(export, ReadOnlyView) else export)


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
