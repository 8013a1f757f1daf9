"""The step-time model on published runs that it has not seen: the bounds that the project promises."""

import numpy as np
import pytest

from anabranch.costs.training.published import read_published
from anabranch.costs.training.validation import (
    Summary,
    constant_mfu,
    cross_validate,
    layout_regrets,
    score_table,
)

ROWS, _ = read_published()


@pytest.fixture(scope="module")
def scored():
    return cross_validate(ROWS)


def test_errors_are_within_the_promised_bounds(scored):
    summary = Summary.of([one.error_pct for one in scored])
    assert summary.mape_pct <= 12 and summary.median_pct <= 8


def test_intervals_cover_what_they_say(scored):
    assert 0.85 <= np.mean([one.covered for one in scored]) <= 0.95


def test_the_predicted_best_layout_is_about_the_best(scored):
    regrets = layout_regrets(scored)
    assert len(regrets) >= 15 and np.median(regrets) <= 3


def test_a_constant_utilisation_is_far_worse(scored):
    constant = Summary.of(constant_mfu(ROWS, ROWS))
    assert constant.mape_pct > 2 * Summary.of([one.error_pct for one in scored]).mape_pct


def test_another_table_is_scored_without_its_own_leak_groups():
    """A third of the groups as a table of its own, scored by the whole: the same rows must not help themselves."""
    groups = sorted({row.leak_group for row in ROWS})[::3]
    held = [row for row in ROWS if row.leak_group in groups]
    errors = Summary.of([one.error_pct for one in score_table(held, ROWS)])
    assert 2 < errors.median_pct <= 8 and errors.mape_pct <= 14
