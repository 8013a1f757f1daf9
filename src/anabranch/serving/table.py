"""The page table that steps read: which page holds which tokens of which chain, and in which format.

Pages are written in the step's own precision. Where they are kept in another, a chain writes into *open* pages,
which lie over its own in the table until they are full and are rewritten.

Shape suffixes: C chains, P pages of a chain.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from anabranch.scheduling.chain import Chain
from anabranch.scheduling.pages import PAGE, PagePool, pages_of
from anabranch.serving.step.base import Int32


class Rewriter(Protocol):
    """Rewrites a full page in the format of another."""

    def rewrite(self, page: int, to: int) -> None: ...


class _Listed(NamedTuple):
    """Whose pages a line of the table shows, of which stay, and how many."""

    chain: Chain
    left: int
    evicted: int
    pages: int


class PageTable:
    """A line of page numbers for each slot. open_pages: where tokens are written first, None where pages are kept
    as they are written; `rewriter` then is not needed."""

    def __init__(
        self, slots: int, tokens: int, open_pages: PagePool | None, rewriter: Rewriter | None
    ) -> None:
        assert open_pages is None or rewriter is not None
        self.lines_CP: Int32 = np.zeros((slots, pages_of(tokens)), dtype=np.int32)
        self._listed: list[_Listed | None] = [None] * slots
        self._open, self._rewriter = open_pages, rewriter
        # By slot: the open page over each page, which is counted as if none had been evicted.
        self._overlay: dict[int, dict[int, int]] = {}

    def enter(self, chain: Chain, count: int) -> None:
        """Bring the chain's line up to date; its next `count` tokens go to open pages where there are such."""
        slot = chain.slot
        assert slot is not None
        listed = chain, chain.left, chain.evicted, len(chain.pages)
        if self._listed[slot] != listed:
            pages = self.pages(chain)
            self.lines_CP[slot, : len(pages)] = pages
            self._listed[slot] = _Listed(*listed)
        if self._open is not None:
            mine = self._overlay.setdefault(slot, {})
            for index in range(chain.cached // PAGE, (chain.cached + count - 1) // PAGE + 1):
                if index not in mine:
                    mine[index] = self._open.take()
                    self.lines_CP[slot, index - chain.evicted // PAGE] = mine[index]

    def pages(self, chain: Chain) -> list[int]:
        """Where the chain's tokens are now: its pages, or the open ones over them."""
        assert chain.slot is not None
        pages = chain.pages[:]
        for index, page in self._overlay.get(chain.slot, {}).items():
            pages[index - chain.evicted // PAGE] = page
        return pages

    def close(self, entered: Iterable[tuple[Chain, int]]) -> None:
        """Rewrite open pages that so many more tokens of each chain have filled in the format in which they are
        kept."""
        if self._open is None or self._rewriter is None:
            return
        for chain, count in entered:
            assert chain.slot is not None
            mine, full = self._overlay[chain.slot], (chain.cached + count) // PAGE
            for index in [i for i in mine if i < full]:
                place = index - chain.evicted // PAGE
                self._rewriter.rewrite(mine[index], chain.pages[place])
                self.lines_CP[chain.slot, place] = chain.pages[place]
                self._open.give_back(mine.pop(index))

    def release(self, running: Iterable[Chain]) -> None:
        """Give back open pages of slots whose chain has left."""
        if self._open is None:
            return
        holders = {chain.slot: (chain, chain.left) for chain in running}
        for slot in list(self._overlay):
            listed = self._listed[slot]
            if listed is None or (listed.chain, listed.left) != holders.get(slot):
                for page in self._overlay.pop(slot).values():
                    self._open.give_back(page)

    def check(self) -> None:
        """Assert that no open page has leaked."""
        if self._open is not None:
            self._open.check({page: 1 for mine in self._overlay.values() for page in mine.values()})
