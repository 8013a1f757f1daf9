"""A tree of prompts' full pages: chains that begin alike hold the same pages."""

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.scheduling.pages import PAGE, PagePool


@dataclass(eq=False)
class _Node:
    page: int
    parent: "_Node | None"
    tokens: tuple[int, ...]
    used: int
    children: "dict[tuple[int, ...], _Node]"


class PrefixTree:
    """Remembers full pages by the tokens before and in them. The tree is one holder of each of its pages."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._roots: dict[tuple[int, ...], _Node] = {}
        self._nodes: dict[int, _Node] = {}
        self._clock = 0

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest remembered beginning of `tokens`, in order; each is now held once more."""
        self._clock += 1
        found: list[int] = []
        children = self._roots
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            node = children.get(tuple(tokens[start : start + PAGE]))
            if node is None:
                break
            node.used = self._clock
            self._pool.share(node.page)
            found.append(node.page)
            children = node.children
        return found

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remember `pages`, full with `tokens` from the beginning on. A beginning that is known keeps its pages."""
        self._clock += 1
        parent, children = None, self._roots
        for i, page in enumerate(pages):
            key = tuple(tokens[i * PAGE : (i + 1) * PAGE])
            node = children.get(key)
            if node is None:
                node = children[key] = _Node(page, parent, key, self._clock, {})
                self._nodes[page] = node
                self._pool.share(page)
            node.used = self._clock
            parent, children = node, node.children

    def forget(self, pages: int) -> int:
        """Give back up to so many pages that only the tree holds, the longest unused first; how many it gave."""
        given = 0
        while given < pages:
            idle = [n for n in self._nodes.values() if not n.children and self._pool.holders(n.page) == 1]
            if not idle:
                break
            for node in sorted(idle, key=lambda n: n.used)[: pages - given]:
                siblings = node.parent.children if node.parent else self._roots
                del siblings[node.tokens], self._nodes[node.page]
                self._pool.give_back(node.page)
                given += 1
        return given

    @property
    def forgettable(self) -> int:
        """How many pages `forget` could give back: those that only the tree holds, and below which nobody holds one."""
        kept: set[int] = set()
        for node in self._nodes.values():
            if self._pool.holders(node.page) > 1:
                above: _Node | None = node
                while above is not None and above.page not in kept:
                    kept.add(above.page)
                    above = above.parent
        return len(self._nodes) - len(kept)

    @property
    def pages(self) -> list[int]:
        """All pages the tree holds."""
        return list(self._nodes)
