"""The leaves of a snapshot's tree, of which pages are lost."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import trio

from tiers import TierError
from tiers.history import leaves_of
from tiers.layout import FIRST_ADDRESS
from tiers.maptree import BAD_PAGE, FANOUT, ROOT_LEVEL, MapTree, Page, page_of


class _Tree(MapTree):
    """It has the leaves 0 and 1, and a second page of `lost_level`, which is lost; or its root is."""

    def __init__(self, lost_level: int) -> None:
        self.name = "tree"
        self.root = FIRST_ADDRESS, 0
        self.lost = lost_level, int(lost_level < ROOT_LEVEL)
        self.loads = 0

    async def load(self, level: int, indices: Iterable[int]) -> dict[int, Page]:
        self.loads += 1
        await trio.lowlevel.checkpoint()
        return {index: self._page(level, index) for index in indices}

    def _page(self, level: int, index: int) -> Page:
        if (level, index) == self.lost:
            return BAD_PAGE
        assert index == 0
        words = [0] * (2 * FANOUT)
        words[0] = FIRST_ADDRESS
        if level in (1, self.lost[0] + 1):
            words[1] = FIRST_ADDRESS
        return page_of(b"".join(word.to_bytes(8, "little") for word in words))


@pytest.mark.parametrize("lost_level", range(1, ROOT_LEVEL + 1))
def test_what_lies_below_a_lost_page_is_passed_over_at_once(lost_level: int) -> None:
    tree = _Tree(lost_level)

    async def body() -> list[int]:
        return [leaf async for leaves in leaves_of(tree) for leaf in leaves]

    assert trio.run(body) == ([] if lost_level == ROOT_LEVEL else [0, 1])
    assert tree.loads <= ROOT_LEVEL + 1


@pytest.mark.parametrize("lost_level", range(1, ROOT_LEVEL + 1))
def test_who_needs_all_leaves_is_told_of_a_lost_page(lost_level: int) -> None:
    async def body() -> None:
        async for _ in leaves_of(_Tree(lost_level), all_of_them=True):
            pass

    with pytest.raises(TierError, match="were lost"):
        trio.run(body)
