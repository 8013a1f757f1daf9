"""The figures of `anabranch bench planner`, not its times."""

import pytest

from anabranch.cli.bench_planner import SIZES, WORKLOADS, bench_planner
from anabranch.errors import ConfigError
from anabranch.placement.policy import PLANNERS

KEYS = {
    "planner",
    "ranks",
    "experts",
    "workload",
    "plan_us_median",
    "plan_us_p90",
    "assign_us_median",
    "guests",
    "max_mean_before",
    "max_mean_after",
}


@pytest.fixture(scope="module")
def rows():
    return bench_planner(rounds=2)


def test_one_flat_row_for_each_planner_size_and_workload(rows):
    assert len(rows) == len(PLANNERS) * len(SIZES) * len(WORKLOADS)
    for row in rows:
        assert set(row) == KEYS
        assert all(isinstance(value, (str, int, float)) for value in row.values())
        assert row["plan_us_p90"] > 0
        assert row["max_mean_after"] <= row["max_mean_before"]


def test_the_planners_do_what_they_are_for(rows):
    for row in rows:
        skewed = row["workload"] != "balanced"
        assert (row["max_mean_before"] > 1.5) == skewed
        if row["planner"] == "static" or not skewed:
            assert row["guests"] == 0
        if row["planner"] == "exact":
            assert row["max_mean_after"] < 1.001


def test_too_few_rounds_are_a_mistake():
    with pytest.raises(ConfigError, match="rounds"):
        bench_planner(rounds=1)
