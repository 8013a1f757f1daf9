"""Guesses from a chain's own past, and drafts only where measured acceptance and step times make them pay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.scheduling.chain import Chain, Request
from anabranch.scheduling.pages import PAGE, PagePool
from anabranch.scheduling.scheduler import Limits, Scheduler
from anabranch.scheduling.speculation import PLAIN_EVERY, STALE, Lookup, Speculator, StepTimes


def chain_of(tokens, new=100, number=0):
    return Chain(Request(tuple(tokens), new), 0, number, list(tokens), cached=len(tokens) - 1)


def test_the_longest_match_is_continued() -> None:
    tokens = [1, 2, 3, 4, 9, 2, 3, 7, 7, 1, 2, 3]
    assert Lookup().continued(tokens, 3) == [4, 9, 2]  # 1 2 3, not the later 2 3
    assert Lookup().continued([2, 3, 4, 2, 3, 5, 2, 3], 2) == [5, 2]  # of equal ones the later
    assert Lookup().continued([1, 2, 3, 4], 3) == []
    assert Lookup().continued([5], 3) == []


def test_a_match_that_reaches_the_end_is_repeated() -> None:
    assert Lookup().continued([8, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 8))
def test_a_guess_follows_an_earlier_place_of_the_same_tokens(tokens, count) -> None:
    grown = Lookup()
    for size in range(1, len(tokens)):
        grown.continued(tokens[:size], count)
    guess = grown.continued(tokens, count)
    assert guess == Lookup().continued(tokens, count)
    pair = tokens[-2:]
    places = [i for i in range(1, len(tokens) - 1) if tokens[i - 1 : i + 1] == pair]
    assert bool(guess) == bool(places)
    if guess:
        assert guess[0] in {tokens[i + 1] for i in places}


def test_times_are_averaged_interpolated_and_forgotten() -> None:
    times = StepTimes()
    times.tell(4, 10.0)
    assert times.reaches(4) and not times.reaches(3)
    times.tell(8, 20.0)
    assert times.of([1, 4, 6, 8, 100]) == [10.0, 10.0, 15.0, 20.0, 20.0]
    times.tell(8, 8.0)
    assert times.of([8]) == [17.0]
    for _ in range(STALE):
        times.tell(4, 10.0)
    assert times.of([8]) == [10.0]  # to be tried again


def measured(speculator):
    """One that knows a step of one row, and takes others to cost the same."""
    speculator.times.tell(1, 1.0)
    return speculator


def rounds(speculator, chain, truth, ms, count):
    """Let the chain go on as `truth` says, with steps that take ms(rows); how many tokens were drafted."""
    drafted = 0
    for _ in range(count):
        draft = speculator.drafts([chain], 0).get(chain, ())
        at = len(chain.tokens)
        agreed = next((i for i, token in enumerate(draft) if token != truth[at + i]), len(draft))
        got = truth[at : at + agreed + 1]
        speculator.times.tell(1 + len(draft), ms(1 + len(draft)))
        speculator.came(chain, got)
        chain.tokens += got
        drafted += len(draft)
    return drafted


def test_drafts_grow_where_guesses_come_and_rows_are_cheap() -> None:
    truth = [1, 2, 3, 4] * 300
    speculator, chain = Speculator(7, within_page=False), chain_of(truth[:8], new=5000)
    rounds(speculator, chain, truth, lambda rows: 10.0 + 0.1 * rows, 30)
    assert speculator.acceptance(chain) > 0.9
    assert len(speculator.drafts([chain], 0)[chain]) == 7


def test_drafts_stop_where_a_row_costs_as_much_as_a_step() -> None:
    truth = [1, 2, 3, 4] * 300
    speculator, chain = Speculator(7, within_page=False), chain_of(truth[:8], new=5000)
    rounds(speculator, chain, truth, lambda rows: 10.0 * rows, 20)
    assert rounds(speculator, chain, truth, lambda rows: 10.0 * rows, 100) == 0
    assert speculator.acceptance(chain) > 0.9  # known all the same


def test_drafts_stop_for_the_chain_whose_guesses_fail() -> None:
    good, bad = chain_of([1, 2, 3, 4] * 4, new=5000), chain_of([5, 6, 7, 8] * 4, new=5000, number=1)
    speculator = Speculator(4, within_page=False)
    for i in range(PLAIN_EVERY - 10):
        drafts = speculator.drafts([good, bad], 0)
        speculator.times.tell(2 + sum(map(len, drafts.values())), 10.0 + sum(map(len, drafts.values())))
        for chain, got in ((good, [len(good.tokens) % 4 + 1]), (bad, [100 + i])):
            speculator.came(chain, got)
            chain.tokens += got
        bad.tokens += [5, 6]  # a guess is at hand at every step
    drafts = speculator.drafts([good, bad], 0)
    assert len(drafts[good]) > 0
    assert bad not in drafts


@pytest.mark.parametrize("rows", [1, 31, 33, 65, 130])
def test_a_measured_step_is_known_by_its_own_rows(rows) -> None:
    times = StepTimes()
    times.tell(rows, 10.0)
    assert times.reaches(rows) and not times.reaches(rows // 2)


def test_a_step_now_and_then_is_plain() -> None:
    truth = [1, 2] * 2000
    speculator, chain = Speculator(3, within_page=False), chain_of(truth[:8], new=4000)
    plain = [rounds(speculator, chain, truth, lambda rows: 10.0, 1) == 0 for _ in range(3 * PLAIN_EVERY)]
    assert plain[0]  # nothing is measured yet
    assert sum(plain[1:]) == 3


def test_a_draft_ends_where_the_chain_or_the_page_does() -> None:
    full, paged = chain_of([1, 2] * 4, new=3), chain_of([1, 2] * 6, new=100)
    assert len(measured(Speculator(7, within_page=False)).drafts([full], 0)[full]) == 2
    assert paged.cached == 11
    assert len(measured(Speculator(9, within_page=True)).drafts([paged], 0)[paged]) == PAGE - 12


def test_the_scheduler_keeps_what_was_accepted_and_no_more() -> None:
    pool = PagePool(4)
    scheduler = Scheduler(
        Limits(slots=2, chunk=64, tokens=64), pool, measured(Speculator(6, within_page=False))
    )
    (chain,) = scheduler.add(Request((1, 2, 3) * 4, 30))
    scheduler.done(scheduler.plan(), [[1]])
    (part,) = scheduler.plan()
    assert part.draft == (2, 3, 1, 2, 3, 1)
    assert (part.tokens, part.entered(3)) == (7, 3)
    scheduler.done([part], [[2, 3, 9]])
    assert chain.tokens[-4:] == [1, 2, 3, 9]
    assert chain.remaining == 1
    assert (scheduler.tally.drafted, scheduler.tally.accepted, scheduler.tally.decoded) == (6, 2, 3)
    scheduler.check()


def test_no_chain_gives_way_to_a_guess() -> None:
    pool = PagePool(2)
    scheduler = Scheduler(
        Limits(slots=2, chunk=64, tokens=32), pool, measured(Speculator(6, within_page=False))
    )
    for _ in range(2):
        scheduler.add(Request((1, 2, 3, 4) * 3, 4))
    scheduler.done(scheduler.plan(), [[1], [1]])
    parts = scheduler.plan()
    assert [part.draft for part in parts] == [(2, 3), (2, 3)]
    (older, younger) = (part.chain for part in parts)
    scheduler.done(parts, [[2, 3, 4], [2, 3, 4]])
    assert older.end is not None and younger.end is not None
    assert scheduler.tally.preempted == 0
    scheduler.check()
