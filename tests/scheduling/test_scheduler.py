"""The scheduler by itself: no page leaks, slots and chunks are kept, every request ends with all its tokens."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.pages import PAGE, PagePool
from anabranch.scheduling.scheduler import Limits, Part, Scheduler
from anabranch.scheduling.thinking import Thinking

LONGEST = 6 * PAGE


def token_after(tokens: list[int]) -> int:
    """A stand-in for a model: the next token follows from all before it."""
    return (sum(tokens) * 31 + len(tokens)) % 97


class Cache:
    """A stand-in for page memory: what each slot of each page holds, so that a step sees only what was entered."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}

    def enter(self, part: Part) -> None:
        chain = part.chain
        for at in range(chain.cached, chain.cached + part.tokens):
            self.held[chain.pages[at // PAGE], at % PAGE] = chain.tokens[at]
        seen = [self.held[chain.pages[i // PAGE], i % PAGE] for i in range(chain.cached + part.tokens)]
        assert seen == chain.tokens[: len(seen)], "the pages of a chain hold its tokens"

    def copy(self, chain: Chain, other: Chain, place: int) -> bool:
        page, to = chain.pages[place], other.pages[place]
        self.held |= {(to, at): token for (of, at), token in self.held.items() if of == page}
        return True


def step(scheduler: Scheduler, cache: Cache) -> list[Part]:
    parts = scheduler.plan()
    limits = scheduler.limits
    slots = [chain.slot for chain in scheduler.running]
    assert len(slots) == len(set(slots)) <= limits.slots and None not in slots
    assert sum(p.tokens for p in parts if p.tokens > 1) <= limits.chunk
    assert len({p.chain for p in parts}) == len(parts)
    for part in parts:
        cache.enter(part)
    scheduler.done(parts, [[token_after(p.chain.tokens)] for p in parts if p.last])
    scheduler.check()
    return parts


def expected(request: Request) -> list[int]:
    """The chain's tokens as one would compute them alone."""
    chain = Chain(request, 0, 0, list(request.prompt))
    while chain.end is None:
        chain.append(token_after(chain.tokens))
    return chain.tokens


REQUESTS = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=3 * PAGE).map(tuple),
    max_new_tokens=st.integers(3, 3 * PAGE),
    samples=st.integers(1, 3),
    stop_tokens=st.sampled_from([frozenset[int](), frozenset({5, 50})]),
    thinking=st.sampled_from([None, Thinking(4, (7, 8), (9,)), Thinking(0, (7,))]),
)
OPERATIONS = st.lists(st.one_of(REQUESTS, st.integers(0, 40)), min_size=1, max_size=25)


@given(OPERATIONS, st.integers(1, 4), st.integers(1, 40), st.integers(6, 12))
def test_whatever_happens_every_chain_ends_right(
    operations: list[Request | int], slots: int, chunk: int, pages: int
) -> None:
    """A number is a step, and a cancel where it hits a living chain."""
    cache = Cache()
    scheduler = Scheduler(Limits(slots, chunk, LONGEST), PagePool(pages), copy=cache.copy)
    chains: list[Chain] = []
    for operation in operations:
        if isinstance(operation, Request):
            chains += scheduler.add(operation)
            continue
        if operation < len(chains):
            scheduler.cancel(chains[operation])
            scheduler.check()
        step(scheduler, cache)
    for _ in range(20_000):
        if scheduler.idle:
            break
        assert step(scheduler, cache), "a step that does nothing would be repeated for ever"
    assert scheduler.idle
    for chain in chains:
        whole = expected(chain.request)
        assert chain.end is not None and chain.pages == []
        assert chain.tokens == (whole[: len(chain.tokens)] if chain.end is End.CANCELLED else whole)
    assert scheduler.pool.free == pages - len(scheduler.prefixes.pages)


def run(scheduler: Scheduler, request: Request, each: Callable[[], None] = lambda: None) -> list[Chain]:
    """On a pool that is new."""
    chains, cache = scheduler.add(request), Cache()
    while not scheduler.idle:
        step(scheduler, cache)
        each()
    return chains


def test_samples_share_the_pages_of_their_prompt() -> None:
    scheduler = Scheduler(Limits(8, 512, LONGEST), PagePool(40))
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, scheduler.pool.pages - scheduler.pool.free)

    run(scheduler, Request((1,) * (3 * PAGE + 1), PAGE - 2, samples=8), count)
    assert most == 3 + 8, "three pages of the prompt, and one of its own for each sample"
    assert scheduler.tally.reused == 7 * 3 * PAGE
    scheduler.add(Request((1,) * (3 * PAGE + 1), 4))
    assert [part.tokens for part in scheduler.plan()] == [1], "the prompt is still known"


@pytest.mark.parametrize("length", [1, 7, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE - 1])
def test_samples_copy_the_end_of_their_prompt(length: int) -> None:
    cache = Cache()
    scheduler = Scheduler(Limits(8, 512, LONGEST), PagePool(40), copy=cache.copy)
    chains = scheduler.add(Request(tuple(range(length)), PAGE, samples=8))
    first, then = step(scheduler, cache), step(scheduler, cache)
    assert [p.tokens for p in first] == [length]
    assert [p.tokens for p in then] == [1] * 8, "of the prompt only its last token, for its logits"
    assert scheduler.tally.reused == 7 * (length - 1)
    assert len({chain.pages[(length - 1) // PAGE] for chain in chains}) == 8
    while not scheduler.idle:
        step(scheduler, cache)
    assert all(chain.tokens == expected(chain.request) for chain in chains)


def test_what_cannot_be_copied_is_computed() -> None:
    scheduler = Scheduler(Limits(8, 512, LONGEST), PagePool(40), copy=lambda *_: False)
    scheduler.add(Request((1,) * (PAGE + 5), PAGE, samples=3))
    cache = Cache()
    assert [[p.tokens for p in step(scheduler, cache)] for _ in range(2)] == [[PAGE + 5], [1, 5, 5]]
    assert scheduler.tally.reused == 2 * PAGE


def test_the_youngest_gives_way_and_comes_again() -> None:
    scheduler = Scheduler(Limits(3, 512, LONGEST), PagePool(6))
    chains = run(scheduler, Request((1, 2, 3), 5 * PAGE, samples=3))
    assert scheduler.tally.preempted > 0
    assert chains[0].left == 1, "the oldest chain has left once, at its end"
    assert all(chain.tokens == expected(chain.request) for chain in chains)


def test_a_prompt_enters_in_chunks() -> None:
    scheduler = Scheduler(Limits(1, 10, LONGEST), PagePool(8))
    scheduler.add(Request((1,) * 25, 3))
    cache = Cache()
    assert [[p.tokens for p in step(scheduler, cache)] for _ in range(5)] == [[10], [10], [5], [1], [1]]
    assert (scheduler.tally.prefilled, scheduler.tally.decoded) == (25, 2)


def test_requests_that_can_never_run_are_refused() -> None:
    scheduler = Scheduler(Limits(1, 8, LONGEST), PagePool(2))
    with pytest.raises(ConfigError, match="max_new_tokens: prompt and new tokens make 97"):
        scheduler.add(Request((1,) * (LONGEST - 3), 4))
    with pytest.raises(ConfigError, match="kv_memory: a chain of 33 tokens needs 3 pages"):
        scheduler.add(Request((1,) * 32, 1))
    assert scheduler.idle
    for name in ("slots", "chunk", "tokens"):
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: 0})
