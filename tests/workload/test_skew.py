"""Shares: proportional to the weights, capped at one, summing to the experts a token picks."""

import numpy as np
import pytest

from anabranch.workload.skew import capped_share


def test_shares_are_proportional_while_none_is_capped():
    assert capped_share(np.array([[3.0, 2.0, 1.0]]), 1) == pytest.approx(np.array([[0.5, 1 / 3, 1 / 6]]))


def test_what_the_cap_cuts_goes_to_the_others_in_proportion():
    assert capped_share(np.array([[9.0, 2.0, 1.0]]), 2) == pytest.approx(np.array([[1.0, 2 / 3, 1 / 3]]))


def test_each_row_is_capped_by_itself():
    got = capped_share(np.array([[1.0, 1.0, 1.0, 1.0], [1e9, 1e6, 1.0, 0.0]]), 3)
    assert got == pytest.approx(np.array([[0.75] * 4, [1.0, 1.0, 1.0, 0.0]]))
