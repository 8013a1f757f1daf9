import numpy as np

from anabranch.placement.base import Homes
from anabranch.placement.exact import ExactPlanner, alias
from anabranch.placement.load import load_of


def test_one_hot_expert_is_spread_over_all_ranks():
    counts_RE = np.full((4, 4), 0)
    counts_RE[:, 0] = 100
    plan = ExactPlanner().plan(counts_RE, Homes.contiguous(4, 4))
    assert plan.rows_R.tolist() == [100, 100, 100, 100]
    assert plan.guests == 3


def test_a_balanced_load_stays_at_home():
    counts_RE = np.full((3, 6), 7)
    plan = ExactPlanner().plan(counts_RE, Homes.contiguous(6, 3))
    assert plan.guests == 0
    assert plan.cap == 42


def test_the_hottest_expert_goes_first_so_that_one_copy_is_enough():
    # Rank 0 must give 15 of its 40 rows: expert 2 alone has as many.
    counts_RE = np.array([[4, 5, 20, 11, 10, 0, 0, 0], [0] * 8])
    plan = ExactPlanner().plan(counts_RE, Homes.contiguous(8, 2))
    assert plan.rows_R.tolist() == [25, 25]
    assert np.argwhere(plan.guest_RE).tolist() == [[1, 2]]


def test_a_donor_below_the_cap_is_filled_in_turn():
    # Rows 3, 35, 22: rank 1 fills rank 0 up to 20 and falls to 18 itself, which rank 2 fills.
    counts_RE = np.array([[1, 12, 10], [1, 12, 10], [1, 11, 2]])
    plan = ExactPlanner().plan(counts_RE, Homes.contiguous(3, 3))
    assert plan.rows_R.tolist() == [20, 20, 20]
    assert plan.quota_RE.tolist() == [[3, 17, 0], [0, 18, 2], [0, 0, 20]]


def test_slack_spares_the_trip_that_would_refill_a_donor():
    # Rows 0, 30, 18 under a cap of 20: rank 1 may stop at the cap, and nobody needs to fill it.
    homes = Homes.contiguous(3, 3)
    load = load_of(np.array([[0, 30, 18]] + [[0, 0, 0]] * 2), homes)
    guests = alias(load, homes, cap=20)
    assert (guests.experts, guests.ranks, guests.rows) == ([1], [0], [10])


def test_slots_needed():
    planner = ExactPlanner()
    assert planner.slots_needed(Homes.contiguous(10, 4)) == 3
    assert planner.slots_needed(Homes.contiguous(10, 1)) == 0
