import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes, Plan, max_over_mean


def test_contiguous_homes_leave_the_last_slots_empty():
    homes = Homes.contiguous(experts=5, ranks=3)
    assert homes.rank_E.tolist() == [0, 0, 1, 1, 2]
    assert homes.slot_E.tolist() == [0, 1, 0, 1, 0]
    assert (homes.experts, homes.slots) == (5, 2)


@pytest.mark.parametrize(("experts", "ranks"), [(0, 2), (4, 0)])
def test_nothing_to_place_is_a_mistake(experts, ranks):
    with pytest.raises(ConfigError, match="ranks"):
        Homes.contiguous(experts, ranks)


def test_a_plan_tells_its_loads_and_guests():
    counts_RE = np.array([[4, 0, 1], [4, 2, 1]])
    quota_RE = np.array([[5, 2, 0], [3, 0, 2]])
    plan = Plan(counts_RE, quota_RE, Homes.contiguous(3, 2), cap=7)
    assert plan.rows_R.tolist() == [7, 5]
    assert plan.home_rows_R.tolist() == [10, 2]
    assert plan.guest_RE.tolist() == [[False, False, False], [True, False, False]]
    assert plan.guests == 1
    assert plan.fits
    assert not Plan(counts_RE, quota_RE, plan.homes, cap=6).fits


def test_max_over_mean():
    assert max_over_mean(np.array([3, 1])) == 1.5
    assert max_over_mean(np.array([0, 0])) == 1.0
