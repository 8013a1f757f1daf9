import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes, max_over_mean
from anabranch.placement.bounded import BoundedPlanner, level, shed
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.guests import Guests
from anabranch.placement.load import load_of


def _counts(expert_rows: list[int], ranks: int) -> np.ndarray:
    """All rows from the last rank: a plan does not depend on the source, and empty sources are fine."""
    counts_RE = np.zeros((ranks, len(expert_rows)), dtype=np.int64)
    counts_RE[-1] = expert_rows
    return counts_RE


def test_a_load_within_the_cap_is_left_alone():
    plan = BoundedPlanner(epsilon=0.05).plan(_counts([52, 52, 48, 48], 2), Homes.contiguous(4, 2))
    assert plan.guests == 0
    assert plan.rows_R.tolist() == [104, 96]
    assert plan.cap == 105


def test_on_two_ranks_one_guest_gives_exact_balance():
    plan = BoundedPlanner(epsilon=0.05).plan(_counts([90, 30, 20, 20], 2), Homes.contiguous(4, 2))
    assert plan.rows_R.tolist() == [80, 80]
    assert np.argwhere(plan.guest_RE).tolist() == [[1, 0]]


def test_as_many_guests_as_needed_and_not_more():
    # Rank 0 holds 160 of 240 rows and must give at least 76: two copies, since its hottest has 60.
    plan = BoundedPlanner(epsilon=0.05).plan(
        _counts([60, 60, 40, 10, 10, 20, 20, 10, 10], 3), Homes.contiguous(9, 3)
    )
    assert plan.fits
    assert plan.guests == 2


def test_the_bound_costs_about_half_the_copies_of_exact_balance():
    rng, homes = np.random.default_rng(0), Homes.contiguous(128, 16)
    bounded = exact = 0
    for _ in range(20):
        counts_RE = rng.multinomial(4096, rng.dirichlet(np.full(128, 0.7)), size=16)
        plan = BoundedPlanner(epsilon=0.05).plan(counts_RE, homes)
        assert plan.fits
        bounded += plan.guests
        exact += ExactPlanner().plan(counts_RE, homes).guests
    assert bounded <= 0.6 * exact


def test_few_slots_are_a_hard_limit_and_the_plan_says_so():
    # Sixteen equal experts on one rank: one guest can take a sixteenth of the load, no more.
    counts_RE = _counts([10] * 16 + [0] * 16, 2)
    plan = BoundedPlanner(slots=1).plan(counts_RE, Homes.contiguous(32, 2))
    assert not plan.fits
    assert plan.rows_R.tolist() == [150, 10]


def test_the_alias_construction_steps_in_where_shedding_wastes_a_slot():
    # Cap 10. Shedding moves 4 of rank 2's rows to rank 0, whose only slot is then taken with a row to spare.
    homes = Homes.contiguous(3, 3)
    counts_RE = _counts([5, 11, 14], 3)
    guests = shed(load_of(counts_RE, homes), homes, cap=10, slots=1, least=1)
    assert (guests.experts, guests.ranks, guests.rows) == ([2], [0], [4])
    plan = BoundedPlanner(epsilon=0.0, slots=1).plan(counts_RE, homes)
    assert plan.quota_RE.tolist() == [[5, 0, 5], [0, 10, 0], [0, 1, 9]]


def test_the_alias_construction_respects_the_break_even():
    # The same, but its guest of one row is not worth a copy.
    plan = BoundedPlanner(epsilon=0.0, slots=1, min_rows=2).plan(
        _counts([5, 11, 14], 3), Homes.contiguous(3, 3)
    )
    assert not plan.fits
    assert plan.rows_R.tolist() == [9, 11, 10]


def test_no_guest_below_the_break_even():
    counts_RE = _counts([70, 50, 40, 40], 2)
    homes = Homes.contiguous(4, 2)
    assert BoundedPlanner(min_rows=20).plan(counts_RE, homes).rows_R.tolist() == [100, 100]
    # Rank 1 has room for 25 rows up to the cap, so that no guest of 26 is to be had.
    plan = BoundedPlanner(min_rows=26).plan(counts_RE, homes)
    assert plan.guests == 0
    assert not plan.fits


def test_a_guest_worth_its_weights_may_take_more_than_evens_out():
    # Evening out takes 20 rows; 25 are worth a copy and still fit.
    plan = BoundedPlanner(epsilon=0.05, min_rows=25).plan(
        _counts([70, 50, 40, 40], 2), Homes.contiguous(4, 2)
    )
    assert plan.rows_R.tolist() == [95, 105]


def test_a_copy_once_made_takes_more_than_the_excess_so_that_slots_last():
    # Cap 19, loads 20, 10, 20, one slot a rank. Were rank 0 to shed its excess only, it would stand at the
    # cap with no room for the excess of rank 2, and rank 1 would have no slot left.
    homes = Homes.contiguous(6, 3)
    guests = shed(load_of(_counts([0, 20, 0, 10, 10, 10], 3), homes), homes, cap=19, slots=1, least=1)
    assert (guests.experts, guests.ranks, guests.rows) == ([1, 4], [1, 0], [3, 1])


def test_levelling_evens_out_a_chain_of_copies():
    homes = Homes.contiguous(3, 3)
    load = load_of(_counts([120, 60, 0], 3), homes)
    guests = Guests()
    guests.add(expert=0, rank=1, rows=15)
    guests.add(expert=1, rank=2, rows=60)
    assert level(guests, load, homes, least=1) is guests
    rows_R = np.array([120 - guests.rows[0], 60 + guests.rows[0] - guests.rows[1], guests.rows[1]])
    assert max_over_mean(rows_R) < 1.15  # from 1.75
    assert guests.experts == [0, 1]


def test_levelling_gives_back_no_more_than_the_guest_can_spare():
    homes = Homes.contiguous(2, 2)
    load = load_of(_counts([50, 50], 2), homes)
    guests = Guests()
    guests.add(expert=0, rank=1, rows=40)
    level(guests, load, homes, least=10)
    assert guests.rows == [10]


def test_slots_needed():
    assert BoundedPlanner(slots=3).slots_needed(Homes.contiguous(8, 4)) == 3
    assert BoundedPlanner(slots=3).slots_needed(Homes.contiguous(4, 2)) == 2
    assert BoundedPlanner(slots=3).slots_needed(Homes.contiguous(8, 1)) == 0


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"slots": 0}, "slots"),
        ({"slots": 1.5}, "slots"),
        ({"min_rows": -1}, "min_rows"),
    ],
)
def test_settings_out_of_range_name_themselves(settings, setting):
    with pytest.raises(ConfigError, match="at least") as caught:
        BoundedPlanner(**settings)
    assert caught.value.setting == setting
