"""Pages are counted exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.scheduling.pages import EXTENT, PAGE, PagePool, pages_of


def test_pages_of_tokens() -> None:
    assert [pages_of(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]


@given(st.integers(1, 6), st.integers(0, 1 << 28), st.lists(st.integers(0, 99), max_size=60))
def test_a_page_is_free_when_nobody_holds_it(pages: int, first: int, choices: list[int]) -> None:
    pool = PagePool(pages, first)
    held: dict[int, int] = {}
    for choice in choices:
        some = sorted(held)[choice % len(held)] if held else None
        if choice % 3 == 0 and pool.free:
            page = pool.take()
            assert page not in held and first <= page < first + pages
            held[page] = 1
        elif choice % 3 == 1 and some is not None:
            pool.share(some)
            held[some] += 1
        elif some is not None:
            pool.give_back(some)
            held[some] -= 1
            held = {page: n for page, n in held.items() if n}
        pool.check(held)
        assert pool.free == pages - len(held)
        assert all(pool.holders(page) == n for page, n in held.items())


def test_misuse_is_noticed() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.give_back(page)
    for wrong in (pool.give_back, pool.share):
        with pytest.raises(AssertionError, match="free"):
            wrong(page)
    pool.take()
    with pytest.raises(AssertionError, match="expected"):
        pool.check({})
    with pytest.raises(ConfigError, match="kv_memory"):
        PagePool(0)


def test_chains_that_grow_side_by_side_lie_apart_and_each_in_a_row() -> None:
    pool = PagePool(4 * EXTENT + 3)
    chains = [[pool.take()] for _ in range(4)]
    for _ in range(EXTENT - 1):
        for pages in chains:
            pages.append(pool.take(pages[-1]))
    assert sorted(pages[0] for pages in chains) == [0, EXTENT, 2 * EXTENT, 3 * EXTENT]
    assert all(pages == list(range(pages[0], pages[0] + EXTENT)) for pages in chains)
    assert {pool.take(chains[0][-1]) for _ in range(3)} == {4 * EXTENT + i for i in range(3)}
    assert pool.free == 0
    for page in chains[1]:
        pool.give_back(page)
    assert pool.take(chains[0][-1]) == chains[1][0]
