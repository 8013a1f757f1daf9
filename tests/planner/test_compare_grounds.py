"""What `compare` and docs/energy.md say of the published runs, computed from them again."""

from itertools import combinations

import numpy as np
import pytest

from anabranch.costs.training.published import read_published
from anabranch.costs.training.validation import cross_validate, leave_out


@pytest.fixture(scope="module")
def rows():
    return read_published()[0]


def log_errors(scored):
    """Of seconds of a step."""
    return np.array([np.log(one.row.in_quantity(one.predicted) / one.row.step_s) for one in scored])


@pytest.mark.parametrize(("same_stack", "pairs", "expected"), [(False, 1049, -0.05), (True, 350, 0.08)])
def test_errors_for_one_model_on_two_chips_hardly_correlate(rows, same_stack, pairs, expected):
    errors = log_errors(cross_validate(rows))

    def kind(row):
        stack = (row.setup.layout.precision, row.setup.software.family) if same_stack else ()
        return row.setup.shape.family, stack

    chips = [row.setup.cluster.chip.kind for row in rows]
    two = np.array([
        (errors[i], errors[j])
        for i, j in combinations(range(len(rows)), 2)
        if chips[i] != chips[j] and kind(rows[i]) == kind(rows[j])
    ])  # fmt: skip
    both_ways = np.concatenate([two, two[:, ::-1]])
    assert len(two) == pairs
    assert np.corrcoef(both_ways.T)[0, 1] == pytest.approx(expected, abs=0.02)


def test_trainium1_without_its_runs_is_predicted_much_too_fast(rows):
    scored = leave_out(rows, lambda row: row.setup.cluster.chip.kind)
    chips = [row.setup.cluster.chip.kind for row in rows]
    errors = log_errors(scored)[[chip == "trainium1" for chip in chips]]
    assert len(errors) == 12 and "trainium2" not in chips
    assert np.exp(errors.mean()) == pytest.approx(0.6, abs=0.03)
