import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes
from anabranch.placement.least_loaded import LeastLoadedPlanner


def _plan(planner: LeastLoadedPlanner, expert_rows: list[int], ranks: int):
    counts_RE = np.zeros((ranks, len(expert_rows)), dtype=np.int64)
    counts_RE[0] = expert_rows
    return planner.plan(counts_RE, Homes.contiguous(len(expert_rows), ranks))


def test_up_to_the_threshold_nothing_moves():
    # Loads 130 and 70: max/mean is 1.3.
    plan = _plan(LeastLoadedPlanner(min_chunk_rows=1, threshold=1.3), [100, 30, 40, 30], 2)
    assert plan.guests == 0
    assert plan.fits


def test_above_the_threshold_the_hottest_expert_spills():
    plan = _plan(LeastLoadedPlanner(min_chunk_rows=1, threshold=1.3), [101, 30, 40, 29], 2)
    assert plan.quota_RE.tolist() == [[70, 30, 0, 0], [31, 0, 40, 29]]


def test_chunks_go_to_the_least_loaded_rank_first():
    plan = _plan(LeastLoadedPlanner(min_chunk_rows=1, threshold=1.0), [90, 10, 30, 30], 4)
    assert plan.quota_RE[:, 0].tolist() == [40, 30, 10, 10]


def test_a_rest_below_a_chunk_stays_at_home():
    plan = _plan(LeastLoadedPlanner(min_chunk_rows=32, threshold=1.0), [101, 30, 40, 29], 2)
    assert plan.guests == 0
    assert not plan.fits


def test_a_chunk_that_fits_nowhere_goes_whole_to_the_least_loaded_rank():
    # Capacity 100; expert 0 is 60 over, no other rank has room for 50 rows: rank 2 takes all 60.
    plan = _plan(LeastLoadedPlanner(min_chunk_rows=50, threshold=1.0), [160, 75, 65], 3)
    assert plan.rows_R.tolist() == [100, 75, 125]
    assert not plan.fits


def test_a_room_of_just_one_chunk_is_taken():
    plan = _plan(LeastLoadedPlanner(min_chunk_rows=50, threshold=1.0), [160, 50, 90], 3)
    assert plan.rows_R.tolist() == [110, 100, 90]


def test_alpha_widens_the_capacity():
    plan = _plan(LeastLoadedPlanner(alpha=1.2, min_chunk_rows=1, threshold=1.0), [150, 0, 50, 0], 2)
    assert plan.rows_R.tolist() == [120, 80]
    assert plan.cap == 120


def test_slots_needed_has_no_limit_of_its_own():
    assert LeastLoadedPlanner().slots_needed(Homes.contiguous(8, 4)) == 6


@pytest.mark.parametrize(
    ("settings", "setting"),
    [({"alpha": 0.9}, "alpha"), ({"min_chunk_rows": 0}, "min_chunk_rows"), ({"threshold": 0.5}, "threshold")],
)
def test_settings_out_of_range_name_themselves(settings, setting):
    with pytest.raises(ConfigError) as caught:
        LeastLoadedPlanner(**settings)
    assert caught.value.setting == setting
