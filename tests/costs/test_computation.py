import numpy as np
import pytest

from anabranch.costs.computation import Computation

ALL_MS = {100: 10.0, 200: 20.0, 400: 40.0}


def test_the_fullest_rank_counts_where_ranks_share_nothing():
    assert Computation(ALL_MS, {}).ms(np.array([100.0, 300.0])) == pytest.approx(30.0)
    assert Computation(ALL_MS, {200: 20.0}).ms(np.array([100.0, 300.0])) == pytest.approx(30.0)


def test_a_rank_that_still_computes_when_others_are_done_is_faster():
    shared = Computation(ALL_MS, {200: 15.0})
    assert shared.alone == 0.75
    assert shared.ms(np.array([300.0, 300.0])) == pytest.approx(30.0)
    assert shared.ms(np.array([0.0, 300.0])) == pytest.approx(0.75 * 30.0)
    assert shared.ms(np.array([300.0, 100.0])) == pytest.approx(10.0 + 0.75 * 20.0)
    # All four, then two, then one of them: as fast as alone, as with one other of three, as with all three.
    four = shared.ms(np.array([100.0, 200.0, 100.0, 400.0]))
    assert four == pytest.approx(10.0 + 10.0 * (0.75 + 0.25 / 3) + 0.75 * 20.0)


def test_noise_makes_nobody_slower_alone_nor_twice_as_fast():
    assert Computation(ALL_MS, {200: 30.0}).alone == 1.0
    assert Computation(ALL_MS, {200: 1.0}).alone == 0.5
    assert Computation(ALL_MS, {200: 15.0}).ms(np.zeros(2)) == pytest.approx(10.0)
