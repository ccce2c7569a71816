"""Generic netlink, byte by byte: what was recorded between this codec and a kernel 6.1 with an NBD client."""

from __future__ import annotations

import contextlib
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terrace.attach import kernelnbd
from terrace.attach.netlink import (
    CTRL_ATTR_FAMILY_ID,
    CTRL_ATTR_FAMILY_NAME,
    CTRL_ATTR_MCAST_GROUPS,
    CTRL_CMD_GETFAMILY,
    GENL_ID_CTRL,
    NLMSG_ERROR,
    Family,
    attributes_in,
    messages_in,
    number,
    pack,
    u64,
)

ASKED_FAMILY = "1c00000010000500010000000000000003010000080002006e626400"
TOLD_FAMILY = (
    "b400000010000000010000009400000001020000080002006e6264000600010020000000080003000100000008000400000000000800"
    "05000a00000054000600140001000800010001000000080002000a000000140002000800010002000000080002000a00000014000300"
    "0800010003000000080002000a000000140004000800010005000000080002000a000000240007002000010008000200090000001100"
    "01006e62645f6d635f67726f757000000000"
)
CONNECT = (
    "84000000200005000200000000000000010100000c00020000000040000000000c00030000020000000000000c000400000000000000"
    "00000c000800008d2700000000000c0005007d050000000000000c000600000000000000000015000a00746572726163653a706f6f6c"
    "2f766f6c00000000100007800c0001800800010004000000"
)
CONNECTED = "1c0000002000000002000000e561d1ec010100000800010000000000"
ACKNOWLEDGED = "240000000200000102000000e561d1ec0000000084000000200005000200000000000000"
STATUS = "2c00000020000000030000002c95b19605010000180009001400010008000100000000000500020001000000"
LINK_DEAD = "1c000000200000000000000000000000040100000800010000000000"
REFUSED = "2400000002000001050000003b6814a8eaffffff4c000000200005000500000000000000"


def test_a_request_is_what_the_kernel_understood() -> None:
    asked = pack(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, [(CTRL_ATTR_FAMILY_NAME, "nbd")])
    assert asked == bytes.fromhex(ASKED_FAMILY)
    connect = pack(
        32,
        kernelnbd.CMD_CONNECT,
        2,
        [
            (kernelnbd.ATTR_SIZE_BYTES, u64(1 << 30)),
            (kernelnbd.ATTR_BLOCK_SIZE_BYTES, u64(512)),
            (kernelnbd.ATTR_TIMEOUT, u64(0)),
            (kernelnbd.ATTR_DEAD_CONN_TIMEOUT, u64(30 * 86400)),
            (kernelnbd.ATTR_SERVER_FLAGS, u64(0x57D)),
            (kernelnbd.ATTR_CLIENT_FLAGS, u64(0)),
            (kernelnbd.ATTR_BACKEND_IDENTIFIER, "terrace:pool/vol"),
            (kernelnbd.ATTR_SOCKETS, [(kernelnbd.SOCK_ITEM, [(kernelnbd.SOCK_FD, 4)])]),
        ],
    )
    assert connect == bytes.fromhex(CONNECT)


def test_what_the_kernel_says_is_understood() -> None:
    (family,) = messages_in(bytes.fromhex(TOLD_FAMILY))
    assert number(family.attributes[CTRL_ATTR_FAMILY_ID]) == 32
    ((_, group),) = attributes_in(family.attributes[CTRL_ATTR_MCAST_GROUPS])
    assert dict(attributes_in(group)) == {2: b"\x09\0\0\0", 1: b"nbd_mc_group\0"}
    both = list(messages_in(bytes.fromhex(CONNECTED + ACKNOWLEDGED)))
    assert [(message.sequence, message.error) for message in both] == [(2, 0), (2, 0)]
    assert number(both[0].attributes[kernelnbd.ATTR_INDEX]) == 0
    assert both[1].kind == NLMSG_ERROR
    (dead,) = messages_in(bytes.fromhex(LINK_DEAD))
    assert (dead.command, number(dead.attributes[kernelnbd.ATTR_INDEX])) == (kernelnbd.CMD_LINK_DEAD, 0)
    (refused,) = messages_in(bytes.fromhex(REFUSED))
    assert (refused.sequence, refused.error) == (5, errno.EINVAL)
    (status,) = messages_in(bytes.fromhex(STATUS))
    ((kind, item),) = attributes_in(status.attributes[kernelnbd.ATTR_DEVICE_LIST])
    assert kind == kernelnbd.DEVICE_ITEM
    assert {key: number(value) for key, value in attributes_in(item)} == {1: 0, 2: 1}


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_the_decoder(data: bytes) -> None:
    for decode in (messages_in, attributes_in):
        with contextlib.suppress(ValueError):
            list(decode(data))  # type: ignore[operator]


@given(st.data())
def test_a_message_cut_short_is_refused(data: st.DataObject) -> None:
    whole = bytes.fromhex(data.draw(st.sampled_from([TOLD_FAMILY, CONNECTED, STATUS, LINK_DEAD])))
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    with pytest.raises(ValueError, match="netlink"):
        list(messages_in(cut))


def test_this_kernel_is_asked_and_a_family_that_it_has_not_is_enoent() -> None:
    assert number(Family("nlctrl").ask(CTRL_CMD_GETFAMILY, [(CTRL_ATTR_FAMILY_NAME, "nlctrl")])[1]) == GENL_ID_CTRL
    with pytest.raises(FileNotFoundError):
        Family("terrace-none")
