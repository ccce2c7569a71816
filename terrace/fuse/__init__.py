"""Volumes and snapshots as files: DIR/POOL/VOL and DIR/POOL/VOL@SNAP, over FUSE.

`mounted` (terrace.fuse.session) serves a `Directory` at a mount point. Of `Directory` (terrace.fuse.files) there are
two: `PoolDirectory` in the daemon itself, and `DaemonDirectory` in a process of its own, which outlives the daemon.
"""
