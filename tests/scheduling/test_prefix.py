"""The prefix tree finds the longest beginning that it knows, and forgets only what nobody uses."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.scheduling.pages import PAGE, PagePool
from anabranch.scheduling.prefix import PrefixTree

# A few kinds of pages, so that beginnings are often shared.
TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=8)


def tokens_of(kinds: list[int]) -> list[int]:
    return [kind for kind in kinds for _ in range(PAGE)]


def insert(tree: PrefixTree, pool: PagePool, tokens: list[int]) -> list[int]:
    """As a chain does: share what is known, compute the rest, remember all, leave."""
    pages = tree.match(tokens)
    pages += [pool.take() for _ in range(len(tokens) // PAGE - len(pages))]
    tree.insert(tokens, pages)
    for page in pages:
        pool.give_back(page)
    return pages


@given(TEXTS, st.lists(st.integers(0, 1), max_size=5))
def test_the_longest_known_beginning_is_found(texts: list[list[int]], asked: list[int]) -> None:
    pool = PagePool(40)
    tree = PrefixTree(pool)
    for kinds in texts:
        insert(tree, pool, tokens_of(kinds))
    known = {tuple(kinds[:n]) for kinds in texts for n in range(1, len(kinds) + 1)}
    assert len(tree.pages) == len(known), "one page for each beginning"
    longest = max((n for n in range(len(asked) + 1) if n == 0 or tuple(asked[:n]) in known), default=0)
    found = tree.match([*tokens_of(asked), 1, 0, 1])
    assert len(found) == longest
    pool.check({page: 1 + (page in found) for page in tree.pages})


@given(TEXTS, st.integers(1, 12))
def test_it_forgets_leaves_nobody_holds_and_no_more_than_asked(texts: list[list[int]], pages: int) -> None:
    pool = PagePool(40)
    tree = PrefixTree(pool)
    for kinds in texts:
        insert(tree, pool, tokens_of(kinds))
    before, free = len(tree.pages), pool.free
    held = tree.match(tokens_of(texts[0]))
    given = tree.forget(pages)
    assert given == min(pages, before - len(held))
    assert len(tree.pages) == before - given and pool.free == free + given
    again = tree.match(tokens_of(texts[0]))
    assert again == held, "what a chain holds stays known"


def test_the_longest_unused_goes_first() -> None:
    pool = PagePool(4)
    tree = PrefixTree(pool)
    old, new = tokens_of([0]), tokens_of([1])
    insert(tree, pool, old)
    insert(tree, pool, new)
    for page in tree.match(old):
        pool.give_back(page)
    assert tree.forget(1) == 1
    assert tree.match(new) == [] and len(tree.match(old)) == 1


def test_part_of_a_page_is_not_shared() -> None:
    pool = PagePool(2)
    tree = PrefixTree(pool)
    insert(tree, pool, tokens_of([0]))
    assert tree.match([0] * (PAGE - 1)) == [] and len(tree.match([0] * (PAGE + 1))) == 1


def test_a_page_above_one_that_is_held_cannot_be_forgotten() -> None:
    """As of a chain that let its first page go and holds a later one."""
    pool = PagePool(3)
    tree = PrefixTree(pool)
    insert(tree, pool, tokens_of([0, 1, 0]))
    first, second, third = tree.match(tokens_of([0, 1, 0]))
    pool.give_back(first), pool.give_back(third)
    assert tree.forgettable == tree.forget(3) == 1
    pool.give_back(second)
    assert tree.forgettable == tree.forget(3) == 2
