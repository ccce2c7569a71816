"""The bytes of the requests that `terrace.fuse.transmission` takes off the kernel itself, and of their replies.

Source: linux/fuse.h, protocol 7.31 (Linux 5.4) and later. WRITE has had its size since 7.9, FALLOCATE is of 7.19 and
LSEEK of 7.24. Everything is in the host's byte order. Numbers that aren't used here are not named.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

# Head of every request
#   offset size type field
#        0    4 u32  length of the request with this head
#        4    4 u32  opcode
#        8    8 u64  unique, which the reply repeats
#       16    8 u64  node
#       24   16      uid, gid, pid; length of extensions, padding (not used)
REQUEST: Final = Struct("=IIQQ16x")
assert REQUEST.size == 40

# READ and WRITE, behind the head; a WRITE's data follows
#   offset size type field
#        0    8 u64  file handle, as OPEN replied
#        8    8 u64  offset in bytes
#       16    4 u32  length in bytes
#       20    4 u32  flags of the request (not used)
#       24    8 u64  lock owner (not used)
#       32    4 u32  flags of the open file, as open(2) takes them
#       36    4      padding
TRANSFER: Final = Struct("=QQIIQI4x")
assert TRANSFER.size == 40

# FSYNC: file handle, flags (1: data only), padding
SYNC: Final = Struct("=QI4x")
assert SYNC.size == 16

# FALLOCATE
#   offset size type field
#        0    8 u64  file handle
#        8    8 u64  offset in bytes
#       16    8 u64  length in bytes
#       24    4 u32  mode (FALLOC_*)
#       28    4      padding
ALLOCATE: Final = Struct("=QQQI4x")
assert ALLOCATE.size == 32

# LSEEK: file handle, offset in bytes, whence, padding; its reply is one u64, the offset found
SEEK: Final = Struct("=QQI4x")
assert SEEK.size == 24

# Head of every reply
#   offset size type field
#        0    4 u32  length of the reply with this head
#        4    4 i32  0, or an errno below zero; nothing follows then
#        8    8 u64  unique
REPLY: Final = Struct("=IiQ")
assert REPLY.size == 16

# Reply to WRITE: the head, bytes written, padding
WRITTEN: Final = Struct("=IiQI4x")
assert WRITTEN.size == 24

# Reply to LSEEK: the head, the offset
FOUND: Final = Struct("=IiQQ")
assert FOUND.size == 24

# Reply to INIT, behind the head, as far as it is looked at
#   offset size type field
#        0    4 u32  major version
#        4    4 u32  minor version
#        8    4 u32  longest read-ahead in bytes
#       12    4 u32  flags
#       16    2 u16  most background requests at a time
#       18    2 u16  background requests from which on the device counts as congested
#       20    4 u32  longest WRITE in bytes
#       24    4 u32  granularity of times
#       28    2 u16  most pages in one request
INIT: Final = Struct("=IIIIHHIIH")
assert INIT.size == 30
INIT_OPCODE: Final = 26

FORGET: Final = 2
READ: Final = 15
WRITE: Final = 16
FSYNC: Final = 20
FLUSH: Final = 25
INTERRUPT: Final = 36
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
LSEEK: Final = 46

LONGEST_BYTES: Final = 1 << 20
"""Of one READ or WRITE: 256 pages of 4 KiB, the most that Linux puts into one request unless an administrator raises
fs.fuse.max_pages_limit. Where libfuse asks for more (its pages are of 64 KiB, or it follows that limit), the reply to
INIT is brought down to this."""
BUFFER_BYTES: Final = LONGEST_BYTES + 4096

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10
SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4
O_DSYNC: Final = 0o10000
