"""Synchronous mirroring: legs, their order and their fencing, what counts as in sync, resync and verification."""
