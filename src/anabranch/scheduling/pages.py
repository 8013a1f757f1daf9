"""Pages of keys and values as numbers: which are free, and how many hold each of the others."""

from anabranch.errors import ConfigError

# Tokens of a page.
PAGE = 16


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
        self._free = list(range(first + pages - 1, first - 1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free page, held once. The caller has asked `free`."""
        page = self._free.pop()
        self._holders[page - self.first] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a held page."""
        assert self._holders[page - self.first] > 0, f"page {page} is free"
        self._holders[page - self.first] += 1

    def give_back(self, page: int) -> None:
        """One holder less; free with the last."""
        assert self._holders[page - self.first] > 0, f"page {page} is free already"
        self._holders[page - self.first] -= 1
        if self._holders[page - self.first] == 0:
            self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page - self.first]

    def check(self, held: dict[int, int]) -> None:
        """Assert that exactly these pages are held, each by so many: no page has leaked."""
        counted = {self.first + i: n for i, n in enumerate(self._holders) if n}
        assert counted == held, f"pages held {counted}, expected {held}"
        assert len(self._free) + len(counted) == self.pages and len(set(self._free)) == len(self._free)
