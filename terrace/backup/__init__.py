"""Backups: a snapshot, or what changed between two, as a stream; and volumes made of such streams again.

`stream` is the format, `extents` what has to be read, `write` the writing, `restore` the applying, `chain` the
decisions about a directory of backups, `directory` and `files` its effects. `nbdsource` and `daemon` are the only ones
that know of NBD and of the daemon; everything else works on the Protocols `Source`, `Sink`, `Target`, `Destination`
and `RestoredState`.
"""
