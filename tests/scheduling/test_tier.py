"""The scheduler with evictions and a tier, under random load: no page leaks, and every chain ends."""

from itertools import cycle

from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.scheduling import eviction
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.pages import PAGE, PagePool, pages_of
from anabranch.scheduling.scheduler import Limits, Scheduler


class Shelf:
    """A tier that only counts: room for so many tokens, and loses the copies of some chains."""

    def __init__(self, room: int, loses_every: int) -> None:
        self.room, self.loses_every, self.fetched = room, loses_every, 0
        self.kept: dict[Chain, int] = {}

    def keep(self, chain: Chain) -> bool:
        assert chain not in self.kept and chain.slot is not None
        if sum(self.kept.values()) + chain.held > self.room:
            return False
        self.kept[chain] = chain.held
        return True

    def fetch(self, chain: Chain, first: int) -> bool:
        assert self.kept.pop(chain) == chain.held
        assert first <= len(chain.pages) == pages_of(chain.held)
        self.fetched += 1
        return self.fetched % self.loses_every != 0

    def drop(self, chain: Chain) -> None:
        del self.kept[chain]


LOADS = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 280), st.integers(1, 3)), min_size=2, max_size=5
)


@settings(max_examples=100)
@given(
    LOADS, st.integers(0, 3), st.integers(24, 60), st.sampled_from([0, 300, 10_000]), st.integers(2, 5),
    st.sets(st.integers(0, 400), max_size=4),
)  # fmt: skip
def test_no_page_leaks_and_every_chain_ends(loads, seed, pages, room, loses_every, cancels):
    shelf = Shelf(room, loses_every)
    copies = cycle([True, False])
    scheduler = Scheduler(
        Limits(slots=4, chunk=32, tokens=400), PagePool(pages), tier=shelf, copy=lambda *_: next(copies)
    )
    chains = [
        chain
        for i, (prompt, new, samples) in enumerate(loads)
        for chain in scheduler.add(
            Request(
                tuple((seed * i + t) % 7 for t in range(prompt)), min(new, pages * PAGE - prompt), samples
            )
        )
    ]
    step = 0
    while not scheduler.idle:
        step += 1
        assert step < 20_000
        parts = scheduler.plan()
        assert parts, "nothing runs and nothing is idle"
        assert all(len(part.chain.pages) * PAGE >= part.chain.held + part.tokens for part in parts)
        for part in parts:
            eviction.draw(part.chain, [1.0] * pages_of(part.chain.held + part.tokens))
        got = [part.chain for part in parts if part.last]
        scheduler.done(parts, [[step % 5]] * len(got))
        for chain in got:
            if chain.slot is not None and eviction.due(chain, eviction.LEAST):
                full = chain.held // PAGE
                scheduler.evict(chain, eviction.leaving(chain, [0.5] * full, eviction.LEAST))
                assert chain.held < eviction.LEAST
        if step in cancels and chains:
            scheduler.cancel(chains[step % len(chains)])
        scheduler.check()
        assert set(shelf.kept) == {c for c in scheduler.waiting if c.kept}
    assert not shelf.kept
    assert all(
        c.end is End.CANCELLED or (c.end is End.LENGTH and c.new_tokens == c.request.max_new_tokens)
        for c in chains
    )
    assert all((c.cached, c.evicted, c.mass, c.pages) == (0, 0, [], []) for c in chains)


def test_a_page_that_leaves_a_chain_stays_with_its_other_holders():
    scheduler = Scheduler(Limits(slots=4, chunk=512, tokens=400), PagePool(64))
    prompt = tuple(range(12 * PAGE))
    first, second = scheduler.add(Request(prompt, 10, samples=2))
    while second.cached < len(prompt):
        parts = scheduler.plan()
        scheduler.done(parts, [[0]] * sum(part.last for part in parts))
    shared = first.pages[2]
    assert shared == second.pages[2] and scheduler.pool.holders(shared) == 3
    first.mass = [0.0] * len(first.pages)
    scheduler.evict(first, [2, 5])
    assert shared not in first.pages and shared in second.pages
    assert scheduler.pool.holders(shared) == 2
    assert first.held == first.cached - 2 * PAGE and second.held == second.cached
    scheduler.check()
