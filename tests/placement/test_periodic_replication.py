import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes
from anabranch.placement.periodic_replication import PeriodicReplicationPlanner, replicate, split

HOMES = Homes.contiguous(4, 4)
HOT_FIRST = np.array([[90, 10, 10, 10]] * 4)
HOT_LAST = np.array([[10, 10, 10, 90]] * 4)


def test_nothing_is_replicated_before_the_first_period_is_over():
    planner = PeriodicReplicationPlanner(slots=1, period=2, window=2)
    guests = [planner.plan(HOT_FIRST, HOMES).guests for _ in range(3)]
    assert guests == [0, 0, 4]


def test_a_steady_load_is_balanced_and_its_rows_are_split_evenly():
    planner = PeriodicReplicationPlanner(slots=1, period=1, window=1)
    planner.plan(HOT_FIRST, HOMES)
    plan = planner.plan(HOT_FIRST, HOMES)
    assert plan.quota_RE[:, 0].tolist() == [90, 90, 90, 90]
    assert plan.rows_R.max() < 360


def test_it_plans_with_the_past():
    planner = PeriodicReplicationPlanner(slots=1, period=2, window=1)
    planner.plan(HOT_FIRST, HOMES)
    planner.plan(HOT_FIRST, HOMES)
    plan = planner.plan(HOT_LAST, HOMES)
    assert not plan.fits
    assert plan.quota_RE[3, 3] == 360
    planner.plan(HOT_LAST, HOMES)
    assert planner.plan(HOT_LAST, HOMES).quota_RE[3, 3] == 90


def test_the_window_moves():
    long, short = (PeriodicReplicationPlanner(slots=1, period=4, window=window) for window in (4, 1))
    for planner in (long, short):
        for counts_RE in (HOT_FIRST, HOT_FIRST, HOT_FIRST, HOT_LAST):
            planner.plan(counts_RE, HOMES)
    # The long window saw expert 0 hot three times of four; the short one only expert 3.
    assert long.plan(HOT_FIRST, HOMES).guest_RE[:, 0].sum() > 1
    assert short.plan(HOT_FIRST, HOMES).guest_RE[:, 3].sum() == 3


def test_the_identity_where_old_replicas_would_do_harm():
    planner = PeriodicReplicationPlanner(slots=1, period=1, window=1)
    planner.plan(np.array([[40, 0], [40, 0]]), Homes.contiguous(2, 2))
    plan = planner.plan(np.array([[5, 10], [5, 10]]), Homes.contiguous(2, 2))
    assert plan.guests == 0


def test_new_homes_make_it_forget():
    planner = PeriodicReplicationPlanner(slots=1, period=1, window=4)
    planner.plan(HOT_FIRST, HOMES)
    assert planner.plan(HOT_FIRST, Homes.contiguous(4, 4)).guests == 4
    moved = Homes(HOMES.rank_E[::-1].copy(), HOMES.slot_E, 4)
    assert planner.plan(HOT_LAST, moved).guests == 0
    assert planner.plan(HOT_LAST, moved).guest_RE[:, 3].sum() == 3


def test_replicas_go_where_most_rows_a_copy_are_and_no_rank_hosts_one_twice():
    # Per copy 60, 30, 20, 15 for expert 0 before anything else has 15 or more to share.
    hosts = replicate(np.array([60, 4, 5, 6]), HOMES, slots=1)
    assert sorted(hosts[0]) == [1, 2, 3]
    ranks = [rank for taken in hosts.values() for rank in taken]
    assert len(ranks) == len(set(ranks)) <= 4


def test_no_load_needs_no_replicas():
    assert replicate(np.zeros(4, dtype=np.int64), HOMES, slots=2) == {}


def test_odd_rows_go_to_the_first_copies():
    guests = split(np.array([11, 0, 2]), {0: [2, 1, 3], 1: [0], 2: [0, 1, 3]})
    assert list(zip(guests.experts, guests.ranks, guests.rows, strict=True)) == [
        (0, 2, 3),
        (0, 1, 3),
        (0, 3, 2),
        (2, 0, 1),
    ]


def test_slots_needed():
    assert PeriodicReplicationPlanner(slots=2).slots_needed(HOMES) == 2
    assert PeriodicReplicationPlanner(slots=9).slots_needed(HOMES) == 3


@pytest.mark.parametrize("setting", ["slots", "period", "window"])
def test_settings_out_of_range_name_themselves(setting):
    with pytest.raises(ConfigError) as caught:
        PeriodicReplicationPlanner(**{setting: 0})
    assert caught.value.setting == setting
