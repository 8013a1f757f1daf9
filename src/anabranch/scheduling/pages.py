"""Pages of keys and values as numbers: which are free, and how many hold each of the others."""

from anabranch.errors import ConfigError

# Tokens of a page.
PAGE = 16
# Pages of an extent. A chain is read as a stream as long as its pages follow each other: it grows within extents of its
# own while there are such, also where others grow beside it.
EXTENT = 32


def pages_of(tokens: int) -> int:
    """Pages that so many tokens need."""
    return -(-tokens // PAGE)


class PagePool:
    """Counts who holds each page. A page is free when nobody does.

    first: number of its first page, so that pools of several formats have numbers of their own.
    """

    def __init__(self, pages: int, first: int = 0) -> None:
        if pages < 1:
            raise ConfigError(f"must hold at least one page of {PAGE} tokens", setting="kv_memory")
        self.pages, self.first = pages, first
        # Both with the next one to be taken at their ends.
        self._free = dict.fromkeys(range(first + pages - 1, first - 1, -1))
        self._whole = dict.fromkeys(range((pages - 1) // EXTENT, -1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, after: int | None = None) -> int:
        """A free page, held once: the one behind page `after` where it belongs to nobody's extent, else the first of an
        extent that is free as a whole, else any. The caller has asked `free`."""
        page = self.first if after is None else after + 1
        inside = (page - self.first) % EXTENT != 0 and page in self._free
        if not inside and self._extent(page) not in self._whole:
            beginnings = (self.first + EXTENT * extent for extent in reversed(self._whole))
            page = next(beginnings, next(reversed(self._free)))
        del self._free[page]
        self._whole.pop(self._extent(page), None)
        self._holders[page - self.first] = 1
        return page

    def extend(self, pages: list[int], count: int) -> None:
        """Take so many more for a chain that has `pages`."""
        for _ in range(count):
            pages.append(self.take(pages[-1] if pages else None))

    def share(self, page: int) -> None:
        """One more holder of a held page."""
        assert self._holders[page - self.first] > 0, f"page {page} is free"
        self._holders[page - self.first] += 1

    def give_back(self, page: int) -> None:
        """One holder less; free with the last."""
        assert self._holders[page - self.first] > 0, f"page {page} is free already"
        self._holders[page - self.first] -= 1
        if self._holders[page - self.first] == 0:
            self._free[page] = None
            extent = self._extent(page)
            if not any(self._holders[EXTENT * extent : EXTENT * (extent + 1)]):
                self._whole[extent] = None

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page - self.first]

    def check(self, held: dict[int, int]) -> None:
        """Assert that exactly these pages are held, each by so many: no page has leaked."""
        counted = {self.first + i: n for i, n in enumerate(self._holders) if n}
        assert counted == held, f"pages held {counted}, expected {held}"
        assert len(self._free) + len(counted) == self.pages and not self._free.keys() & counted.keys()
        used = {self._extent(page) for page in counted}
        assert self._whole.keys() == set(range(-(-self.pages // EXTENT))) - used

    def _extent(self, page: int) -> int:
        return (page - self.first) // EXTENT
