import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain, Request
from anabranch.scheduling.eviction import (
    DECAY,
    LEAST,
    RECENT_PAGES,
    SINK_PAGES,
    draw,
    due,
    leaving,
    require_budget,
)
from anabranch.scheduling.pages import PAGE, pages_of


def decoding(held: int, mass: list[float] | None = None, evicted: int = 0) -> Chain:
    """A chain that holds so many tokens and decodes."""
    tokens = held + evicted
    chain = Chain(Request((1,) * (tokens + 1)), 0, 0, [1] * (tokens + 1), cached=tokens, evicted=evicted)
    chain.mass = mass if mass is not None else [1.0] * pages_of(held)
    return chain


@given(st.integers(LEAST, 1000), st.integers(0, 3000), st.integers(0, 20), st.data())
def test_what_leaves_brings_the_chain_within_its_budget_and_spares_both_ends(above, more, gone, data):
    held = above + more
    shares = st.lists(st.floats(0, 1), min_size=pages_of(held), max_size=pages_of(held))
    chain = decoding(held, data.draw(shares), gone * PAGE)
    assert due(chain, above)
    places = leaving(chain, data.draw(shares), above)
    assert places == sorted(set(places))
    assert all(SINK_PAGES <= place < held // PAGE - RECENT_PAGES for place in places)
    left = held - len(places) * PAGE
    # No more than asked for; and as much, unless nothing else may leave.
    assert left < above or left < (SINK_PAGES + RECENT_PAGES + 1) * PAGE
    assert left > above - max(PAGE, above // 8) - PAGE


def test_the_least_attended_leave_and_among_equals_those_that_are_said_again():
    chain = decoding(LEAST + 7 * PAGE)
    middle = range(SINK_PAGES, chain.held // PAGE - RECENT_PAGES)
    like = [0.0] * len(chain.mass)
    chain.mass[middle[2]] = chain.mass[middle[4]] = 0.0
    assert set(leaving(chain, like, chain.held - PAGE)) >= {middle[2], middle[4]}
    chain.mass = [1.0] * len(chain.mass)
    like[middle[3]] = like[middle[5]] = 0.9
    assert set(leaving(chain, like, chain.held - PAGE)) >= {middle[3], middle[5]}


@pytest.mark.parametrize(("prompt", "stays"), [(5 * PAGE - 3, True), (6 * PAGE, True), (6 * PAGE + 1, False)])
def test_a_prompt_stays_where_the_budget_has_room_for_it(prompt, stays):
    above = 16 * PAGE  # six of the prompt, four that are recent, and twice the two that leave at once make 14
    above -= 2 * PAGE if prompt > 5 * PAGE else 0
    chain = Chain(Request((1,) * prompt), 0, 0, [1] * (above + 1), cached=above)
    chain.mass = [0.0] * 6 + [1.0] * (pages_of(above) - 6)
    places = leaving(chain, [0.0] * pages_of(above), above)
    assert places
    assert (min(places) >= pages_of(prompt)) is stays


def test_a_chain_in_prefill_or_within_its_budget_keeps_all():
    chain = decoding(LEAST)
    assert due(chain, LEAST)
    assert not due(chain, LEAST + 1)
    chain.tokens += [1, 1]
    assert not due(chain, LEAST)


def test_attention_fades_and_new_pages_begin_with_none():
    chain = decoding(2 * PAGE, [1.0, 2.0])
    draw(chain, [0.5, 0.25, 0.25])
    assert chain.mass == [DECAY + 0.5, 2 * DECAY + 0.25, 0.25]


def test_a_budget_that_leaves_no_choice_is_refused():
    with pytest.raises(ConfigError, match=f"at least {LEAST}"):
        require_budget(LEAST - 1)
