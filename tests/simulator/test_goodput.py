"""Goodput under failures: the formula against random histories, and its limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.simulator.goodput import NODE_MTBF_H, Failures


@pytest.mark.parametrize(
    ("failures", "interval_s"),
    [
        (Failures(NODE_MTBF_H, 2048, 30.0, 600.0), None),
        (Failures(100.0, 64, 120.0, 300.0), 900.0),
        (Failures(10.0, 40, 60.0, 200.0), None),  # restarts fail as well
    ],
)
def test_random_histories_have_the_predicted_goodput(failures: Failures, interval_s: float | None) -> None:
    useful_s = 4000 * failures.mtbf_s
    found = failures.replay(useful_s, interval_s)
    # Some 4000 failures: the mean is known to about 1 / sqrt(4000) of what is lost.
    assert found.goodput == pytest.approx(failures.goodput(interval_s), rel=0.02)
    assert found.failures == pytest.approx(found.wall_s / failures.mtbf_s, rel=0.05)


@given(st.floats(1.0, 1e5), st.integers(1, 4096), st.floats(0.1, 600.0), st.floats(0.0, 3600.0))
def test_no_interval_is_much_better_than_the_best_one(
    mtbf_h: float, units: int, checkpoint_s: float, restart_s: float
) -> None:
    failures = Failures(mtbf_h, units, checkpoint_s, restart_s)
    if checkpoint_s > failures.mtbf_s / 2:
        return  # Daly's estimate is of small C / M
    best = failures.goodput()
    others = [failures.goodput(failures.interval_s * float(f)) for f in np.geomspace(0.1, 10.0, 41)]
    assert 0.0 <= best < 1.0
    assert max(others) <= best * 1.01 + 1e-12


@given(st.floats(1.0, 1e4), st.floats(1.01, 10.0))
def test_more_reliable_is_better(mtbf_h: float, factor: float) -> None:
    def goodput(hours: float) -> float:
        return Failures(hours, 16, 60.0, 300.0).goodput()

    assert goodput(mtbf_h) < goodput(mtbf_h * factor)


def test_youngs_interval_is_the_limit_of_cheap_checkpoints() -> None:
    failures = Failures(1000.0, 1, 0.36, 0.0)
    assert failures.interval_s == pytest.approx((2 * 0.36 * 3.6e6) ** 0.5, rel=1e-3)


def test_without_hope_there_is_no_goodput() -> None:
    assert Failures(0.001, 1000, 600.0, 600.0).goodput() == 0.0


@pytest.mark.parametrize(
    ("field", "value"), [("mtbf_h", 0.0), ("units", 0), ("checkpoint_s", -1.0), ("restart_s", float("nan"))]
)
def test_impossible_failures_are_named(field: str, value: float) -> None:
    fields = {"mtbf_h": 1.0, "units": 1, "checkpoint_s": 1.0, "restart_s": 1.0, field: value}
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Failures(**fields)  # pyright: ignore[reportArgumentType]
