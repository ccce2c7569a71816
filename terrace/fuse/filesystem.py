"""Names, attributes and open files: pyfuse3's part of the file system.

DIR/POOL/VOL is a volume and DIR/POOL/VOL@SNAP a snapshot; nothing can be made, removed, renamed or resized here, for
that is what `terrace volume` and `terrace snapshot` are for. A file is a block device in all but name: its size is
fixed, a write behind the end is ENOSPC, `O_TRUNC` and truncate are EPERM, since a file that looks empty for a moment
would fail the reads of a loop device over it.

What the kernel may remember
    Names and attributes for `FRESH_S`. Bytes of volumes never (direct IO), since clients of the daemon may change them
    beneath; bytes of snapshots for as long as it likes. A node's number comes from the export's identity, so a volume
    that was made anew under an old name is another file.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Sequence
from typing import Final, TypeVar

import pyfuse3
import trio
import xxhash
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from terrace.exports import ExportRecord
from terrace.fuse.device import Device
from terrace.fuse.files import Directory, OpenFile

FRESH_S: Final = 1.0
"""A resize is seen after at most so long."""
LISTED: Final = 64
"""Entries in one reply to a listing: about 15 KiB. Libfuse's socket bounds it (see terrace.fuse.transmission)."""
LISTED_AT_ONCE: Final = 256
"""Entries made between two checkpoints: ten thousand snapshots must not hold up who reads and writes."""
PREFERRED_IO_BYTES: Final = 128 << 10

T = TypeVar("T")

_ROOT: Final = pyfuse3.ROOT_INODE


class Tree(pyfuse3.Operations):
    """The handlers that pyfuse3 calls. What fails is a FUSEError with the OSError's errno."""

    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(self, directory: Directory, device: Device, *, read_only: bool) -> None:
        super().__init__()
        self._directory = directory
        self._device = device
        self._read_only = read_only
        self._owner = os.getuid(), os.getgid()
        self._nodes: dict[int, str] = {_ROOT: ""}  # to POOL, POOL/VOL or POOL/VOL@SNAP
        self._files: dict[int, OpenFile] = {}  # by handle
        self._listings: dict[int, Sequence[tuple[str, EntryAttributes]]] = {}  # by handle
        self._handle = 0

    def file(self, handle: int) -> OpenFile | None:
        """Who has been opened under that handle."""
        return self._files.get(handle)

    @property
    def open_files(self) -> int:
        return len(self._files)

    def close_all(self) -> None:
        """Give back what nobody closed, because the file system was cut off. Synchronous."""
        while self._files:
            self._files.popitem()[1].close()

    # --- attributes ---

    async def getattr(self, inode: int, ctx: RequestContext | None = None) -> EntryAttributes:
        name = self._name_of(inode)
        if "/" not in name:
            return self._directory_attributes(name)
        entry = self._file_attributes(await _asked(self._directory.export(name)))
        if entry.st_ino != inode:
            raise FUSEError(errno.ESTALE)
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._name_of(parent_inode)
        try:
            wanted = name.decode("ascii")
        except UnicodeDecodeError:
            raise FUSEError(errno.ENOENT) from None  # no pool, volume or snapshot is called so
        if not parent:
            if wanted not in await _asked(self._directory.pools()):
                raise FUSEError(errno.ENOENT)
            return self._directory_attributes(wanted)
        if "/" in parent:
            raise FUSEError(errno.ENOTDIR)
        return self._file_attributes(await _asked(self._directory.export(f"{parent}/{wanted}")))

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        now = await self.getattr(inode)
        if fields.update_size and attr.st_size != now.st_size:
            raise FUSEError(errno.EPERM)
        changes_owner = (fields.update_uid and attr.st_uid != now.st_uid) or (
            fields.update_gid and attr.st_gid != now.st_gid
        )
        if changes_owner or (fields.update_mode and attr.st_mode != now.st_mode):
            raise FUSEError(errno.EPERM)
        return now  # times are what they are; `touch` and `cp -p` shall not fail over them

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        total_bytes, available_bytes = await _asked(self._directory.space())
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = total_bytes // 4096
        answer.f_bfree = answer.f_bavail = available_bytes // 4096
        answer.f_files = answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 2 * 64 + 1
        return answer

    def _name_of(self, inode: int) -> str:
        try:
            return self._nodes[inode]
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _entry(self, inode: int, name: str, mode: int) -> EntryAttributes:
        self._nodes[inode] = name
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = mode
        entry.st_uid, entry.st_gid = self._owner
        entry.entry_timeout = entry.attr_timeout = FRESH_S
        entry.st_blksize = PREFERRED_IO_BYTES
        return entry

    def _directory_attributes(self, name: str) -> EntryAttributes:
        entry = self._entry(_number(f"pool {name}") if name else _ROOT, name, stat.S_IFDIR | 0o500)
        entry.st_nlink = 2
        return entry

    def _file_attributes(self, record: ExportRecord) -> EntryAttributes:
        writable = not record.read_only and not self._read_only
        entry = self._entry(_number(record.identity), record.name, stat.S_IFREG | (0o600 if writable else 0o400))
        entry.st_nlink = 1
        entry.st_size = record.size_bytes
        entry.st_blocks = record.allocated_bytes // 512
        # A volume may change at any time, and nobody notes when it did: programs must not take it for unchanged.
        changed_ns = int(record.created_at * 1e9) if record.read_only else time.time_ns()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = changed_ns
        return entry

    # --- directories ---

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        name = self._name_of(inode)
        if "/" in name:
            raise FUSEError(errno.ENOTDIR)
        if name:
            known = [inode for inode, shown in self._nodes.items() if shown.startswith(f"{name}/")]
            listing: list[tuple[str, EntryAttributes]] = []
            for record in await _asked(self._directory.exports(name)):
                if len(listing) % LISTED_AT_ONCE == LISTED_AT_ONCE - 1:
                    await trio.lowlevel.checkpoint()
                listing.append((record.name.partition("/")[2], self._file_attributes(record)))
            # What was known before and isn't there any more: snapshots come and go for years.
            for inode in set(known) - {entry.st_ino for _, entry in listing}:
                self._nodes.pop(inode, None)
        else:
            pools = await _asked(self._directory.pools())
            listing = [(pool, self._directory_attributes(pool)) for pool in pools]
        self._handle += 1
        self._listings[self._handle] = listing
        return self._handle

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        for index in range(start_id, min(start_id + LISTED, len(listing))):
            name, entry = listing[index]
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index + 1):
                break

    async def releasedir(self, fh: int) -> None:
        self._listings.pop(fh, None)

    # --- files ---

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        name = self._name_of(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if flags & os.O_TRUNC:
            raise FUSEError(errno.EPERM)
        record = await _asked(self._directory.export(name))
        if _number(record.identity) != inode:
            raise FUSEError(errno.ESTALE)
        if writing and (record.read_only or self._read_only):
            raise FUSEError(errno.EROFS)
        file = await _asked(self._directory.open(record, self._device))
        self._handle += 1
        self._files[self._handle] = file
        return FileInfo(fh=self._handle, direct_io=not record.read_only, keep_cache=record.read_only)

    async def release(self, fh: int) -> None:
        if (file := self._files.pop(fh, None)) is not None:
            file.close()

    # --- what isn't done here ---

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        raise FUSEError(errno.EPERM)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        raise FUSEError(errno.EPERM)


def _number(identity: str) -> int:
    """A node's number: the same in every process, never that of the root."""
    return xxhash.xxh3_64_intdigest(identity.encode()) >> 1 | 2


async def _asked(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except OSError as error:
        raise FUSEError(error.errno or errno.EIO) from None
