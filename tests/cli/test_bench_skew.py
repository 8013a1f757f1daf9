"""The skew benchmark: its verdict; a real one where a lab can be."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli.main import app
from anabranch.cli.skew_grid import verdict
from anabranch.lab.kernel import available


def _row(policy, rounds, predicted_ms, error_points=0.0, workload="natural"):
    return {
        "topology": "2x2", "inter_mbit": 200.0, "workload": workload, "policy": policy,
        "step_ms_rounds": rounds, "step_ms_median": float(np.median(rounds)),
        "predicted_ms": predicted_ms, "error_points": error_points,
    }  # fmt: skip


def test_the_verdict_ranks_what_differs_measurably():
    noise = np.array([1.0, 3.0, -2.0, 0.0])
    right = [
        _row("static", (200 + noise).tolist(), 210.0, -3.0),
        _row("exact", (150 - noise).tolist(), 140.0, 2.0),
        _row("bounded", (150.5 + noise).tolist(), 139.0, 1.0),  # too close to `exact` to tell
    ]
    found = verdict(right)
    assert (found.cells, found.ranked_alike, found.pairs, found.open_pairs) == (1, 1, 3, 1)
    assert found.ranked_exactly == 0  # `bounded` is predicted faster than `exact` and was slower by a hair
    assert (found.worst_error_points, found.median_error_points) == (3.0, 2.0)
    assert "within 3.0 points" in found.text()
    wrong = [
        _row("static", (200 + noise).tolist(), 130.0, -9.0, "W2"),
        _row("exact", (150 - noise).tolist(), 140.0, 1.0, "W2"),
    ]
    both = verdict(right + wrong)
    assert (both.cells, both.ranked_alike, both.worst_error_points) == (2, 1, 9.0)
    assert both.natural_error_points == 3.0


@pytest.mark.full
@pytest.mark.skipif(bool(available()), reason=f"no lab here: {available()}")
def test_a_real_cell_is_measured_and_predicted(tmp_path):
    file = tmp_path / "skew.json"
    result = CliRunner().invoke(
        app, ["bench", "skew", "--quick", "--rounds", "3", "--tokens", "64", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["verdict"]["cells"] == 2
    assert {row["policy"] for row in found["rows"]} == {"static", "least_loaded", "exact", "bounded"}
    for row in found["rows"]:
        assert len(row["step_ms_rounds"]) == 3
        # Rows follow from popularity; times of a busy machine are not judged here.
        assert row["predicted_max_mean"] == pytest.approx(row["max_mean"], rel=0.15)
        assert 0.1 < row["predicted_throughput"] <= 1.1
