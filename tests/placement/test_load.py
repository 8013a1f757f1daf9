from heapq import heappop

import numpy as np
import pytest

from anabranch.placement.base import Homes
from anabranch.placement.load import cap_rows, hottest_first, load_of


def test_load_sums_sources_and_homes():
    counts_RE = np.array([[1, 2, 3], [10, 20, 30]])
    load = load_of(counts_RE, Homes.contiguous(3, 2))
    assert load.expert_rows_E.tolist() == [11, 22, 33]
    assert load.rank_rows_R.tolist() == [33, 33]
    assert load.rank_rows_R.dtype == np.int64
    assert load.total_rows == 66


@pytest.mark.parametrize(
    ("total", "ranks", "epsilon", "cap"),
    [(10, 4, 0.0, 3), (8, 4, 0.0, 2), (0, 3, 0.0, 0), (0, 3, 0.5, 0), (100, 4, 0.05, 27), (100, 4, 0.04, 26)],
)
def test_cap_rounds_up(total, ranks, epsilon, cap):
    assert cap_rows(total, ranks, epsilon) == cap


def test_cap_of_a_load_beyond_float_precision_is_not_below_the_mean():
    total = 2**60 + 3
    assert cap_rows(total, 2, 1e-18) >= -(-total // 2)


def test_heaps_hold_the_own_experts_of_loaded_ranks_only():
    counts_RE = np.array([[5, 9, 1, 1, 0, 8]])
    heaps = hottest_first(load_of(counts_RE, Homes.contiguous(6, 3)), Homes.contiguous(6, 3), over_rows=7)
    assert set(heaps) == {0, 2}
    assert [heappop(heaps[0]) for _ in range(2)] == [(-9, -9, 1), (-5, -5, 0)]
    assert [heappop(heaps[2]) for _ in range(2)] == [(-8, -8, 5), (0, 0, 4)]
