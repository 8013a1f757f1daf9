import numpy as np

from anabranch.placement.assign import recv_RE, send_RE
from anabranch.placement.base import Homes, Plan

HOMES = Homes.contiguous(3, 3)
# Expert 0 (home 0) has 12 rows from ranks 0, 1, 2 = 2, 6, 4, computed on ranks 0, 1, 2 = 5, 1, 6.
COUNTS_RE = np.array([[2, 1, 0], [6, 2, 0], [4, 3, 7]])
QUOTA_RE = np.array([[5, 0, 0], [1, 6, 0], [6, 0, 7]])
PLAN = Plan(COUNTS_RE, QUOTA_RE, HOMES, cap=13)


def test_own_rows_stay_and_the_rest_is_matched_in_the_order_of_ranks():
    # Kept: 2, 1, 4. Supply left: 0, 5, 0. Demand left: 3, 0, 2.
    assert [send_RE(PLAN, rank)[:, 0].tolist() for rank in range(3)] == [[2, 0, 0], [3, 1, 2], [0, 0, 4]]


def test_experts_without_guests_go_home():
    assert [send_RE(PLAN, rank)[:, 1].tolist() for rank in range(3)] == [[0, 1, 0], [0, 2, 0], [0, 3, 0]]
    assert send_RE(PLAN, 2)[:, 2].tolist() == [0, 0, 7]


def test_receivers_see_the_same():
    assert recv_RE(PLAN, 0).tolist() == [[2, 0, 0], [3, 0, 0], [0, 0, 0]]
    assert recv_RE(PLAN, 2).tolist() == [[0, 0, 0], [2, 0, 0], [4, 0, 7]]


def test_the_plan_stays_as_it_is():
    send_RE(PLAN, 1)
    recv_RE(PLAN, 1)
    assert COUNTS_RE.tolist() == [[2, 1, 0], [6, 2, 0], [4, 3, 7]]
    assert QUOTA_RE.tolist() == [[5, 0, 0], [1, 6, 0], [6, 0, 7]]
