"""The NBD protocol: codecs, a sans-IO handshake and transmission, a trio server, and a trio client.

It knows exports only as the Protocols in ``nbd.export`` and imports nothing of Terrace, so that
any storage with those methods can be served. ``nbd`` is also the module name of libnbd's Python
binding: run libnbd's tools as subprocesses, from a directory that doesn't hold this package.
"""
