"""Fitting, intervals, and the file that ships."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.costs.training import calibration as subject
from anabranch.costs.training.calibration import calibrate, folds, load_calibration, quantile, without_each
from anabranch.costs.training.efficiency import fit_efficiency
from anabranch.costs.training.published import read_published
from anabranch.errors import DataError

ROWS, _ = read_published()


@pytest.fixture(scope="module")
def fitted():
    return calibrate(ROWS)


def test_the_shipped_file_is_what_the_shipped_table_gives(fitted):
    shipped = load_calibration()
    assert shipped.efficiency.factors == pytest.approx(fitted.efficiency.factors, rel=0.02)
    setups = [row.setup for row in ROWS[::20]]
    for ours, theirs in zip(fitted.predict(setups), shipped.predict(setups), strict=True):
        assert ours.step_s == pytest.approx(theirs.step_s, rel=0.02)
        assert ours.within90.high == pytest.approx(theirs.within90.high, rel=0.05)


def test_a_saved_calibration_predicts_alike(fitted, tmp_path):
    fitted.save(tmp_path / "c.json")
    setups = [row.setup for row in ROWS[:5]]
    for ours, theirs in zip(
        fitted.predict(setups), load_calibration(tmp_path / "c.json").predict(setups), strict=True
    ):
        assert ours.step_s == pytest.approx(theirs.step_s, rel=1e-9)
        assert ours.within80.low == pytest.approx(theirs.within80.low, rel=1e-6)


def test_intervals_hold_the_prediction_and_each_other(fitted):
    for one in fitted.predict([row.setup for row in ROWS]):
        assert one.within90.low < one.within80.low < one.step_s < one.within80.high < one.within90.high


def test_a_chip_without_a_run_has_a_wider_interval(fitted):
    setup = next(row.setup for row in ROWS if row.setup.cluster.chip.kind == "h100")
    stranger = replace(setup.cluster.instance, chip=replace(setup.cluster.chip, kind="h900", family="new"))
    known, unknown = fitted.predict(
        [setup, replace(setup, cluster=replace(setup.cluster, instance=stranger))]
    )
    assert not fitted.has_run("h900") and fitted.has_run("h100")
    assert unknown.within90.high / unknown.step_s > known.within90.high / known.step_s


def test_quantile_counts_the_new_run_among_the_scores():
    scores = np.arange(1.0, 10.0)
    assert quantile(scores, 0.8) == 8.0
    assert quantile(scores, 0.9) == 9.0 == quantile(scores, 0.99)


def test_folds_never_cut_a_leak_group():
    groups = np.array([row.leak_group for row in ROWS])
    unseen = np.zeros(len(ROWS), dtype=int)
    for part in folds(groups):
        assert not set(groups[part.seen]) & set(groups[part.unseen])
        unseen[part.unseen] += 1
    assert (unseen == 1).all()


def test_leaving_out_a_chip_hides_all_of_its_runs():
    for part in without_each(ROWS, lambda row: row.setup.cluster.chip.kind):
        hidden = {ROWS[i].setup.cluster.chip.kind for i in part.unseen}
        assert len(hidden) == 1 and not hidden & {ROWS[i].setup.cluster.chip.kind for i in part.seen}


def test_factors_are_found_again_in_made_up_measurements():
    setups = [row.setup for row in ROWS]
    columns, families = subject.columns_of(setups), subject.families_of(setups)
    truth = load_calibration().efficiency
    truth = truth._replace(factors=truth.factors | {"linear": 2.0, "moe_launch": 1.5})
    found = fit_efficiency(columns, families, truth.step_s(columns, families))
    assert found.factors["linear"] == pytest.approx(2.0, rel=0.1)
    assert (
        np.exp(np.abs(np.log(found.step_s(columns, families) / truth.step_s(columns, families)))).max() < 1.1
    )


def test_too_few_configurations_are_refused():
    with pytest.raises(DataError, match="at least"):
        calibrate(ROWS[:10])


def test_a_file_that_is_none_of_ours_names_the_command(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match="anabranch calibrate"):
        load_calibration(tmp_path / "c.json")


def test_a_repeat_of_one_configuration_moves_little(fitted):
    """Ten copies of an outlier are one configuration: they must not drag its neighbours along."""
    row = replace(ROWS[0], step_s=ROWS[0].step_s * 2, leak_group="copies")
    once, often = (subject.fit([*ROWS, *[row] * count]) for count in (1, 10))
    at = [ROWS[0].setup]
    assert often.spread(at).mean[0] - once.spread(at).mean[0] < 0.1
