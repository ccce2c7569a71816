"""Volumes as block devices of this host: `terrace attach` and `terrace detach`.

Each attachment has a *keeper*, a process of its own (`keeper`), whichever *driver* makes the device: the kernel's NBD
client (`kernelnbd`), or a file in a FUSE mount behind a loop device (`fuseloop`). To the daemon a keeper is one client
more; so the daemon can be restarted, or die, beneath a mounted filesystem.
"""
