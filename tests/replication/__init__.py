"""Mirroring: over stores in memory, with nodes, links and power that fail by seed."""
