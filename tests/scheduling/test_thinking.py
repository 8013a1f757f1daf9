"""The thinking budget: what is forced, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.thinking import Thinking

THINKING = Thinking(budget=4, end=(7, 8), closing=(5, 6))


def grown(tokens: list[int], thinking: Thinking = THINKING, most: int = 20) -> Chain:
    chain = Chain(Request((1, 2), most, thinking=thinking), 0, 0, [1, 2])
    for token in tokens:
        if chain.end is None:
            chain.append(token)
    return chain


def test_an_end_is_forced_when_the_budget_is_spent() -> None:
    assert grown([0, 0, 0]).tokens[2:] == [0, 0, 0]
    assert grown([0, 0, 0, 0]).tokens[2:] == [0, 0, 0, 0, 5, 6, 7, 8]
    assert grown([0, 0, 0, 0, 3, 3]).tokens[2:] == [0, 0, 0, 0, 5, 6, 7, 8, 3, 3]


def test_nothing_is_forced_after_an_end() -> None:
    assert grown([0, 7, 8, 0, 0, 0]).tokens[2:] == [0, 7, 8, 0, 0, 0]
    assert grown([0, 0, 7, 8, 0]).tokens[2:] == [0, 0, 7, 8, 0]


def test_an_end_that_has_begun_is_completed_without_the_closing_words() -> None:
    assert grown([0, 0, 0, 7]).tokens[2:] == [0, 0, 0, 7, 8]


def test_no_budget_ends_the_thought_at_once() -> None:
    chain = grown([3], Thinking(0, (7, 8)))
    assert chain.tokens == [1, 2, 7, 8, 3] and chain.new_tokens == 3
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Request((1,), 2, thinking=Thinking(0, (7, 8)))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="thinking_budget"):
        Thinking(-1, (7,))
    with pytest.raises(ConfigError, match="end_of_thought"):
        Thinking(1, ())


@given(
    st.lists(st.integers(0, 3), min_size=30, max_size=30), st.integers(1, 12), st.integers(1, 25),
    st.lists(st.integers(0, 3), min_size=1, max_size=3), st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip
def test_every_chain_is_bounded_and_holds_an_end(
    tokens: list[int], budget: int, most: int, end: list[int], closing: list[int]
) -> None:
    chain = grown(tokens, Thinking(budget, tuple(end), tuple(closing)), most)
    assert chain.end is End.LENGTH and chain.new_tokens == most
    if most >= budget + len(end) + len(closing):
        new = chain.tokens[2 : 2 + budget + len(end) + len(closing)]
        assert any(new[i : i + len(end)] == end for i in range(len(new)))
