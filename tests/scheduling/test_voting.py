"""Voting: an early end under the rule that cannot err, and the Beta criterion against its integral."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.scheduling.voting import Ballot, beta_confidence

ANSWERS = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=20)


def majority(answers: list[str | None]) -> str | None:
    """Of all samples; of equals the one by the lowest sample."""
    counts = Counter(a for a in answers if a is not None)
    return next((a for a in answers if a is not None and counts[a] == max(counts.values())), None)


def polled(answers: list[str | None], order: list[int], confidence: float = 1.0) -> Ballot:
    """Votes in the order in which samples finish, until decided."""
    ballot = Ballot(len(answers), confidence)
    for sample in order:
        assert not ballot.decided or sample == order[0]
        ballot.cast(sample, answers[sample], 10)
        if ballot.decided:
            break
    assert ballot.decided
    return ballot


@given(ANSWERS, st.randoms(use_true_random=False))
def test_an_early_majority_is_that_of_all(answers: list[str | None], random: np.random.Generator) -> None:
    order = list(range(len(answers)))
    random.shuffle(order)
    assert polled(answers, order).outcome({}).answer == majority(answers)


@given(ANSWERS)
def test_before_its_end_another_answer_could_still_have_come_level(answers: list[str | None]) -> None:
    ballot = polled(answers, list(range(len(answers))))
    before, left = answers[: len(ballot.votes) - 1], len(answers) - len(ballot.votes) + 1
    leader = majority(before)
    ends = {rival: Counter([*before, *[rival] * left]) for rival in ("1", "2", "3", "4") if rival != leader}
    assert leader is None or any(counts[rival] >= counts[leader] for rival, counts in ends.items())


def test_agreement_of_five_of_eight_cancels_three() -> None:
    ballot = Ballot(8)
    for sample, answer in enumerate(["7", "7", "7", "7"]):
        ballot.cast(sample, answer, 100)
        assert not ballot.decided
    ballot.cast(6, "7", 200)
    assert ballot.decided
    outcome = ballot.outcome({4: 100, 5: 20, 7: 130})
    assert (outcome.answer, outcome.counts, outcome.finished, outcome.cancelled) == ("7", {"7": 5}, 5, 3)
    assert outcome.saved_tokens == 20 + 100 + 0  # of a mean of 120


def test_samples_without_an_answer_count_for_nobody() -> None:
    ballot = polled([None, None, "3"], [0, 1, 2])
    assert ballot.outcome({}).answer == "3"
    assert polled([None, None], [0, 1]).outcome({}).answer is None


def test_full_confidence_never_ends_early_by_rounding() -> None:
    ballot = Ballot(200)
    for sample in range(100):
        ballot.cast(sample, "7", 1)
    assert beta_confidence(100, 0) == 1.0 and not ballot.decided


def test_confidence_ends_earlier() -> None:
    certain = polled(["7"] * 40, list(range(40)))
    confident = polled(["7"] * 40, list(range(40)), 0.95)
    assert len(certain.votes) == 21
    assert len(confident.votes) == 4, "1 - 2**-5 is the first above 0.95"


@given(st.integers(0, 30), st.integers(0, 30))
def test_the_beta_criterion_is_its_integral(first: int, second: int) -> None:
    p = (np.arange(10_000) + 0.5) / 10_000
    density = p**first * (1 - p) ** second
    assert beta_confidence(first, second) == pytest.approx(
        density[p > 0.5].sum() / density.sum(), rel=1e-5, abs=1e-7
    )


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="samples"):
        Ballot(0)
    with pytest.raises(ConfigError, match="vote_confidence"):
        Ballot(3, 0.5)
