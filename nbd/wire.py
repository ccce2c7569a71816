"""The bytes of the protocol: constants and structs, all in network byte order.

Names follow the protocol text (NetworkBlockDevice/nbd, ``doc/proto.md``) without their ``NBD_``
prefix. Sizes are asserted below each table. Nothing here decides anything.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

# --- handshake ------------------------------------------------------------------------------

INIT_PASSWD: Final = 0x4E42444D41474943  # "NBDMAGIC"
IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT"
REP_MAGIC: Final = 0x0003E889045565A9

# Greeting, server to client
#   offset size type field
#        0    8 u64  INIT_PASSWD
#        8    8 u64  IHAVEOPT
#       16    2 u16  handshake flags (FLAG_*)
GREETING: Final = Struct(">QQH")
assert GREETING.size == 18

# Client flags, client to server: one u32 (FLAG_C_*)
CLIENT_FLAGS: Final = Struct(">I")

# Option, client to server, followed by `length` bytes of data
#   offset size type field
#        0    8 u64  IHAVEOPT
#        8    4 u32  option (OPT_*)
#       12    4 u32  length
OPTION: Final = Struct(">QII")
assert OPTION.size == 16

# Option reply, server to client, followed by `length` bytes of data
#   offset size type field
#        0    8 u64  REP_MAGIC
#        8    4 u32  option it answers
#       12    4 u32  type (REP_*)
#       16    4 u32  length
OPTION_REPLY: Final = Struct(">QIII")
assert OPTION_REPLY.size == 20

# Answer to OPT_EXPORT_NAME, followed by 124 zero bytes unless NO_ZEROES was negotiated
#   offset size type field
#        0    8 u64  size of the export in bytes
#        8    2 u16  transmission flags (SEND_* and others)
EXPORT_NAME_REPLY: Final = Struct(">QH")
EXPORT_NAME_PADDING: Final = bytes(124)
assert EXPORT_NAME_REPLY.size == 10

# Payloads of REP_INFO; the first u16 is the information type
INFO_EXPORT_PAYLOAD: Final = Struct(">HQH")  # INFO_EXPORT, size in bytes, transmission flags
INFO_BLOCK_SIZE_PAYLOAD: Final = Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum payload
assert INFO_EXPORT_PAYLOAD.size == 12
assert INFO_BLOCK_SIZE_PAYLOAD.size == 14

U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_C_NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11
OPT_TERRACE: Final = 0x54524331  # "TRC1"; not of the protocol, ours: the connection is taken over (nbd.takeover)

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = 0x80000001
REP_ERR_POLICY: Final = 0x80000002
REP_ERR_INVALID: Final = 0x80000003
REP_ERR_PLATFORM: Final = 0x80000004
REP_ERR_TLS_REQD: Final = 0x80000005
REP_ERR_UNKNOWN: Final = 0x80000006
REP_ERR_SHUTDOWN: Final = 0x80000007
REP_ERR_BLOCK_SIZE_REQD: Final = 0x80000008
REP_ERR_TOO_BIG: Final = 0x80000009
REP_ERR_EXT_HEADER_REQD: Final = 0x8000000A

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# Transmission flags
HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
ROTATIONAL: Final = 1 << 4
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_CACHE: Final = 1 << 10
SEND_FAST_ZERO: Final = 1 << 11
BLOCK_STATUS_PAYLOAD: Final = 1 << 12

META_NAMESPACE: Final = "base:"
META_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

MAX_STRING_BYTES: Final = 4096  # export names, queries and messages, by the protocol
MAX_PAYLOAD_BYTES: Final = 32 << 20  # what a client may count on, and the most this server takes

# --- transmission ---------------------------------------------------------------------------

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# Request, client to server; a WRITE is followed by `length` bytes of data
#   offset size type field
#        0    4 u32  REQUEST_MAGIC
#        4    2 u16  command flags (CMD_FLAG_*)
#        6    2 u16  command (CMD_*)
#        8    8 u64  cookie, echoed in the reply
#       16    8 u64  offset in bytes
#       24    4 u32  length in bytes
# The first eight bytes are taken as one number, so that a plain READ or WRITE, magic and all, is
# recognised by one comparison.
REQUEST: Final = Struct(">QQQI")
assert REQUEST.size == 28

# Extended request, client to server, in place of the above after OPT_EXTENDED_HEADERS; followed by
# `length` bytes of data if CMD_FLAG_PAYLOAD_LEN is set, which a WRITE must have
#   offset size type field
#        0    4 u32  EXTENDED_REQUEST_MAGIC
#        4    2 u16  command flags (CMD_FLAG_*)
#        6    2 u16  command (CMD_*)
#        8    8 u64  cookie, echoed in the reply
#       16    8 u64  offset in bytes, echoed in the reply
#       24    8 u64  length in bytes: of the payload with CMD_FLAG_PAYLOAD_LEN, else of the effect
EXTENDED_REQUEST: Final = Struct(">QQQQ")
assert EXTENDED_REQUEST.size == 32

# Payload of a BLOCK_STATUS with CMD_FLAG_PAYLOAD_LEN: this, then a u32 for each context to be told of
#        0    8 u64  length of the effect in bytes
STATUS_FILTER: Final = Struct(">Q")
assert STATUS_FILTER.size == 8

# Simple reply, server to client; a successful READ is followed by its data
#   offset size type field
#        0    4 u32  SIMPLE_REPLY_MAGIC
#        4    4 u32  error (0 or E*)
#        8    8 u64  cookie
# Here too the first eight bytes are one number.
SIMPLE_REPLY: Final = Struct(">QQ")
assert SIMPLE_REPLY.size == 16

# Structured reply chunk, server to client, followed by `length` bytes of payload
#   offset size type field
#        0    4 u32  STRUCTURED_REPLY_MAGIC
#        4    2 u16  flags (REPLY_FLAG_DONE)
#        6    2 u16  type (REPLY_TYPE_*)
#        8    8 u64  cookie
#       16    4 u32  length of the payload
CHUNK: Final = Struct(">QQI")
assert CHUNK.size == 20

# The same with the offset that begins the payload of REPLY_TYPE_OFFSET_DATA
DATA_CHUNK: Final = Struct(">QQIQ")
assert DATA_CHUNK.size == 28

# A whole chunk of REPLY_TYPE_OFFSET_HOLE: the header with length 12, then
#       20    8 u64  offset of the hole in the export
#       28    4 u32  bytes that read as zeroes, not 0
HOLE_CHUNK: Final = Struct(">QQIQI")
assert HOLE_CHUNK.size == 32

# Extended reply chunk, server to client, in place of simple replies and chunks after
# OPT_EXTENDED_HEADERS; followed by `length` bytes of payload
#   offset size type field
#        0    4 u32  EXTENDED_REPLY_MAGIC
#        4    2 u16  flags (REPLY_FLAG_DONE)
#        6    2 u16  type (REPLY_TYPE_*)
#        8    8 u64  cookie
#       16    8 u64  offset of the request, whatever the payload is about
#       24    8 u64  length of the payload
EXTENDED_CHUNK: Final = Struct(">QQQQ")
assert EXTENDED_CHUNK.size == 32

# The same with the beginning of the payload of REPLY_TYPE_OFFSET_DATA, and with all of REPLY_TYPE_OFFSET_HOLE
EXTENDED_DATA_CHUNK: Final = Struct(">QQQQQ")
EXTENDED_HOLE_CHUNK: Final = Struct(">QQQQQI")
assert EXTENDED_DATA_CHUNK.size == 40
assert EXTENDED_HOLE_CHUNK.size == 44

DATA_PREFIX_BYTES: Final = 8  # of a data chunk's payload: the offset
HOLE_PAYLOAD_BYTES: Final = 12

# Payload of REPLY_TYPE_ERROR, followed by the message
#        0    4 u32  error (E*)
#        4    2 u16  length of the message
ERROR_PAYLOAD: Final = Struct(">IH")
assert ERROR_PAYLOAD.size == 6

# Payload of REPLY_TYPE_BLOCK_STATUS: a u32 context id, then descriptors
#        0    4 u32  length of the extent in bytes, not 0
#        4    4 u32  flags, as the context defines them (base:allocation: STATE_*)
DESCRIPTOR: Final = Struct(">II")
assert DESCRIPTOR.size == 8

# Payload of REPLY_TYPE_BLOCK_STATUS_EXT: this, then as many extended descriptors
#        0    4 u32  context id
#        4    4 u32  number of descriptors, not 0
STATUS_EXT: Final = Struct(">II")
assert STATUS_EXT.size == 8

# Extended descriptor
#        0    8 u64  length of the extent in bytes, not 0
#        8    8 u64  flags; the upper half is 0 for contexts that define 32 bits
EXTENDED_DESCRIPTOR: Final = Struct(">QQ")
assert EXTENDED_DESCRIPTOR.size == 16

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

REPLY_FLAG_DONE: Final = 1 << 0
REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_ERROR: Final = 0x8001
REPLY_TYPE_ERROR_OFFSET: Final = 0x8002

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

# First eight bytes of a request or reply as one number
READ_HEAD: Final = REQUEST_MAGIC << 32 | CMD_READ
WRITE_HEAD: Final = REQUEST_MAGIC << 32 | CMD_WRITE
EXTENDED_READ_HEAD: Final = EXTENDED_REQUEST_MAGIC << 32 | CMD_READ
EXTENDED_WRITE_HEAD: Final = EXTENDED_REQUEST_MAGIC << 32 | CMD_FLAG_PAYLOAD_LEN << 16 | CMD_WRITE
FUA_BIT: Final = CMD_FLAG_FUA << 16  # in such a number
SIMPLE_HEAD: Final = SIMPLE_REPLY_MAGIC << 32
CHUNK_HEAD: Final = STRUCTURED_REPLY_MAGIC << 32
EXTENDED_HEAD: Final = EXTENDED_REPLY_MAGIC << 32
DONE_BIT: Final = REPLY_FLAG_DONE << 16  # in such a number
DATA_HEAD: Final = CHUNK_HEAD | DONE_BIT | REPLY_TYPE_OFFSET_DATA
EXTENDED_DATA_HEAD: Final = EXTENDED_HEAD | DONE_BIT | REPLY_TYPE_OFFSET_DATA
EXTENDED_DONE_HEAD: Final = EXTENDED_HEAD | DONE_BIT | REPLY_TYPE_NONE
