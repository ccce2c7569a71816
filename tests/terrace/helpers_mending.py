"""Peers that answer what they are set to."""

from __future__ import annotations

from typing import Any

import trio


class FakePeers:
    """Of node a, unless `node` says otherwise."""

    def __init__(self, **answers: Any) -> None:
        self.node = "a"
        self.peers: dict[str, Any] = {}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self._answers = answers

    async def call(self, name: str, method: str, params: dict[str, Any], timeout_s: float = 10.0) -> Any:
        """As `Peers.call`; an OSError that was set is raised."""
        await trio.lowlevel.checkpoint()
        self.asked.append((name, method, params))
        answer = self._answers[name]
        if isinstance(answer, OSError):
            raise answer
        return answer
