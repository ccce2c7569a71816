"""The kernel's generic netlink as its NBD driver needs it: a codec without IO, and a socket to ask with.

Sources: `linux/netlink.h`, `linux/genetlink.h`, `linux/nbd-netlink.h` of the kernel's user API, netlink(7). All numbers
are in the machine's byte order, and messages and attributes begin on multiples of four.

Message
  offset size type field
       0    4 u32  length of the message, with this header
       4    2 u16  type: the family's number, or NLMSG_ERROR
       6    2 u16  flags (REQUEST, ACK, ...)
       8    4 u32  sequence number, echoed
      12    4 u32  port
      16    1 u8   command          (not in NLMSG_ERROR)
      17    1 u8   version
      18    2 -    reserved
      20      ...  attributes

Error (NLMSG_ERROR), which is also the acknowledgement
      16    4 s32  0, or the negated errno
      20   16      the request's header

Attribute
       0    2 u16  length, with this header and without the padding behind it
       2    2 u16  type, and NESTED where its value is attributes
       4      ...  value
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final

HEADER: Final = Struct("=IHHII")
COMMAND: Final = Struct("=BBH")
ERROR: Final = Struct("=i")
ATTRIBUTE: Final = Struct("=HH")
assert (HEADER.size, COMMAND.size, ATTRIBUTE.size) == (16, 4, 4)

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
NETLINK_CAP_ACK: Final = 10

NLMSG_ERROR: Final = 2
FLAG_REQUEST: Final = 1
FLAG_ACK: Final = 4
NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF

GENL_ID_CTRL: Final = 16
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2
CTRL_ATTR_MCAST_GROUPS: Final = 7
CTRL_ATTR_MCAST_GRP_NAME: Final = 1
CTRL_ATTR_MCAST_GRP_ID: Final = 2

MAX_MESSAGE_BYTES: Final = 32 << 10
ANSWER_TIMEOUT_S: Final = 60.0
"""The kernel answers within its call, and takes long only where it has to wait for I/O that it gives up."""

Value = int | bytes | str | Sequence["Attribute"]
Attribute = tuple[int, Value]
"""Type and value: bytes as they are, text with a zero behind it, attributes nested, numbers as u32; else `u64`."""


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little" if _LITTLE else "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little" if _LITTLE else "big")


def number(value: bytes) -> int:
    """An integer attribute of any size."""
    return int.from_bytes(value, "little" if _LITTLE else "big")


_LITTLE: Final = Struct("=H").pack(1) == b"\1\0"


def pack(family: int, command: int, sequence: int, attributes: Sequence[Attribute], *, flags: int = 0) -> bytes:
    """A request that is acknowledged."""
    body = COMMAND.pack(command, 1, 0) + _pack_attributes(attributes)
    return HEADER.pack(HEADER.size + len(body), family, FLAG_REQUEST | FLAG_ACK | flags, sequence, 0) + body


def _pack_attributes(attributes: Sequence[Attribute]) -> bytes:
    packed = bytearray()
    for kind, value in attributes:
        if isinstance(value, str):
            data = value.encode() + b"\0"
        elif isinstance(value, (bytes, bytearray)):
            data = bytes(value)
        elif isinstance(value, int):
            data = u32(value)
        else:
            kind |= NESTED
            data = _pack_attributes(value)
        packed += ATTRIBUTE.pack(ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)
    return bytes(packed)


class Message:
    """One message from the kernel."""

    __slots__ = ("attributes", "command", "error", "kind", "sequence")

    def __init__(self, kind: int, sequence: int, command: int, error: int, attributes: bytes) -> None:
        self.kind = kind
        self.sequence = sequence
        self.command = command
        self.error = error
        """Of NLMSG_ERROR: 0 for an acknowledgement, else an errno."""
        self.attributes = dict(attributes_in(attributes))


def messages_in(data: bytes) -> Iterator[Message]:
    """What one datagram holds. Raises ValueError for what isn't netlink."""
    at = 0
    while at < len(data):
        if len(data) - at < HEADER.size:
            raise ValueError(f"{len(data) - at} bytes where a netlink message begins")
        length, kind, _, sequence, _ = HEADER.unpack_from(data, at)
        if not HEADER.size + COMMAND.size <= length <= len(data) - at:
            raise ValueError(f"a netlink message of {length} bytes in {len(data) - at}")
        body = data[at + HEADER.size : at + length]
        if kind == NLMSG_ERROR:
            yield Message(kind, sequence, 0, -ERROR.unpack_from(body)[0], b"")
        else:
            yield Message(kind, sequence, body[0], 0, body[COMMAND.size :])
        at += length + -length % 4


def attributes_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each. Raises ValueError."""
    at = 0
    while at < len(data):
        if len(data) - at < ATTRIBUTE.size:
            raise ValueError(f"{len(data) - at} bytes where a netlink attribute begins")
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if not ATTRIBUTE.size <= length <= len(data) - at:
            raise ValueError(f"a netlink attribute of {length} bytes in {len(data) - at}")
        yield kind & _TYPE_MASK, data[at + ATTRIBUTE.size : at + length]
        at += length + -length % 4


class Family:
    """One family of the kernel's generic netlink. Blocks: call it from a thread."""

    def __init__(self, name: str) -> None:
        """Raises OSError: ENOENT where the kernel has no such family."""
        self.name = name
        self._sequence = 0
        with _open() as sock:
            found = self._ask(sock, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, [(CTRL_ATTR_FAMILY_NAME, name)])
        self._id = number(found[CTRL_ATTR_FAMILY_ID])
        self._groups: dict[str, int] = {}
        for _, group in attributes_in(found.get(CTRL_ATTR_MCAST_GROUPS, b"")):
            told = dict(attributes_in(group))
            label = told[CTRL_ATTR_MCAST_GRP_NAME].rstrip(b"\0").decode()
            self._groups[label] = number(told[CTRL_ATTR_MCAST_GRP_ID])

    def ask(self, command: int, attributes: Sequence[Attribute]) -> dict[int, bytes]:
        """Carry out a command; the attributes of its answer. Raises OSError with what the kernel says."""
        with _open() as sock:
            return self._ask(sock, self._id, command, attributes)

    def subscribe(self, group: str) -> socket.socket:
        """A socket that doesn't block, with what the family tells a group; `messages_in` of each datagram."""
        sock = _open()
        try:
            sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, self._groups[group])
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def _ask(self, sock: socket.socket, family: int, command: int, attributes: Sequence[Attribute]) -> dict[int, bytes]:
        self._sequence += 1
        sock.settimeout(ANSWER_TIMEOUT_S)
        sock.send(pack(family, command, self._sequence, attributes))
        answer: dict[int, bytes] = {}
        while True:
            for message in messages_in(sock.recv(MAX_MESSAGE_BYTES)):
                if message.sequence != self._sequence:
                    continue
                if message.kind != NLMSG_ERROR:
                    answer = message.attributes
                elif message.error:
                    raise OSError(message.error, os.strerror(message.error))
                else:
                    return answer


def _open() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    except OSError as error:
        # A kernel without generic netlink has no NBD driver that could be asked.
        raise OSError(errno.ENOENT, f"the kernel has no generic netlink: {error.strerror}") from None
    try:
        sock.bind((0, 0))
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
    except BaseException:
        sock.close()
        raise
    return sock
