import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.least_loaded import LeastLoadedPlanner
from anabranch.placement.periodic_replication import PeriodicReplicationPlanner
from anabranch.placement.policy import PLANNERS, make_planner


@pytest.mark.parametrize("name", PLANNERS)
def test_every_name_makes_a_planner_of_that_name_that_plans(name):
    planner = make_planner(name)
    assert planner.name == name
    plan = planner.plan(np.array([[8, 1], [8, 1]]), Homes.contiguous(2, 2))
    assert plan.quota_RE.sum(axis=0).tolist() == [16, 2]


def test_settings_reach_the_planner():
    bounded = make_planner("bounded", epsilon=0.1, slots=3, min_rows=9)
    assert bounded == BoundedPlanner(epsilon=0.1, slots=3, min_rows=9)
    assert make_planner("least_loaded", epsilon=0.1, min_rows=9) == LeastLoadedPlanner(1.1, 9, 1.3)
    assert make_planner("least_loaded") == LeastLoadedPlanner(1.05, 1, 1.3)
    periodic = make_planner("periodic_replication", slots=3)
    assert isinstance(periodic, PeriodicReplicationPlanner)
    assert periodic.slots == 3


def test_planners_that_remember_are_not_shared():
    assert make_planner("periodic_replication") is not make_planner("periodic_replication")


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest():
    with pytest.raises(ConfigError) as caught:
        make_planner("bonded")
    assert caught.value.setting == "planner"
    assert "did you mean 'bounded'?" in str(caught.value)
    for name in PLANNERS:
        assert name in str(caught.value)


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(ConfigError, match="'zzz' is unknown; choose one of"):
        make_planner("zzz")


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"epsilon": -0.01}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"slots": 0}, "slots"),
        ({"min_rows": -1}, "min_rows"),
    ],
)
def test_settings_out_of_range_name_themselves_for_every_planner(name, settings, setting):
    with pytest.raises(ConfigError, match="must be") as caught:
        make_planner(name, **settings)
    assert caught.value.setting == setting
