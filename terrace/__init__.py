"""The application: configuration, the daemon, its control API and the command line.

Imports `nbd`, `tiers` and `replication` and puts them together in one place, `terrace.daemon`. Nobody imports it.
"""
