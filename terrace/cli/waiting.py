"""What is said of a change that takes long, and of one whose answer somebody no longer waits for."""

from __future__ import annotations

from terrace.cli.output import aside


def where_to_look(path: tuple[str, ...]) -> str:
    """The command that shows the state of what a request, by its path below /v1, changes."""
    match path:
        case ("pools", pool, "volumes", volume, "mirror", *_):
            return f"terrace volume mirror show {pool}/{volume}"
        case ("pools", pool, "volumes", volume, "snapshots", _, "clone"):
            return f"terrace volume list {pool}"
        case ("pools", pool, "volumes", volume, "snapshots", *_):
            return f"terrace snapshot list {pool}/{volume}"
        case ("pools", pool, "snapshots", *_):
            return f"terrace snapshot list {pool}"
        case ("pools", pool, "volumes", *_):
            return f"terrace volume list {pool}"
        case ("pools", *_):
            return "terrace pool list"
        case ("nodes", *_):
            return "terrace volume mirror list"
        case _:
            return "terrace status"


def stopped_waiting(path: tuple[str, ...]) -> str:
    """Of a request that was sent and whose answer didn't come."""
    return f"stopped waiting: what was asked for may still be done; {_see(path)}"


def stopped_afterwards(path: tuple[str, ...]) -> str:
    """Of a command that was interrupted when the daemon had said already that it is done."""
    return f"stopped, after what was asked for was done; {_see(path)}"


def _see(path: tuple[str, ...]) -> str:
    look = where_to_look(path)
    return f"see `{look}`" if path[4:5] == ("mirror",) else f"see the state with `{look}`"


def tell_slow(path: tuple[str, ...]) -> None:
    """On a terminal: that it isn't done yet, and what tells why."""
    if path[4:5] == ("mirror",):
        sentence = f"It isn't done yet; see `terrace volume mirror explain {path[1]}/{path[3]}` for what it waits for."
        aside(sentence, always=True)
    else:
        aside(f"It isn't done yet; see the state with `{where_to_look(path)}`.", always=False)
