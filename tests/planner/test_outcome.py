"""What a layout comes to: hours, dollars and energy follow from the step, and one assumption at a time moves them."""

from dataclasses import replace

import pytest

from anabranch.costs.bounds import Bounds, exactly
from anabranch.costs.training.calibration import load_calibration
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.planner.answer import Question, answer
from anabranch.planner.outcome import Terms, breakdown, outcome, sensitivity, utilisation
from anabranch.planner.pareto import front, on_fewer_nodes, undominated
from anabranch.planner.search import Request, search
from anabranch.workload.hf_config import read_shape

CATALOG, CALIBRATION = load_catalog(), load_calibration()
TERMS = Terms(CATALOG.figure("pue"), CATALOG.figure("electricity"), goodput=exactly(1.0))
REQUEST = Request(
    read_shape("Qwen3-30B-A3B"), CATALOG.cluster("p5.48xlarge:4"), 1e11, 4096, 256, skew={32: 2.0}
)  # fmt: skip


@pytest.fixture(scope="module")
def best():
    return search(REQUEST, CALIBRATION).best


def test_dollars_are_hours_times_price(best):
    cost = outcome(REQUEST, best, TERMS, CALIBRATION).within90
    hours = REQUEST.steps * best.step.step_s / 3600
    assert cost.hours.mid == pytest.approx(hours)
    assert cost.owned.basis == "on-demand"
    assert cost.usd.mid == pytest.approx(hours * 4 * 55.04)
    assert cost.usd.low / cost.usd.mid == pytest.approx(best.step.within90.low / best.step.step_s)


def test_failures_lengthen_the_run_and_idle_hours_are_paid_for(best):
    plain = outcome(REQUEST, best, TERMS, CALIBRATION).within80
    terms = replace(TERMS, goodput=Bounds(0.5, 0.8, 1.0), occupancy=0.5)
    lossy = outcome(REQUEST, best, terms, CALIBRATION).within80
    assert lossy.hours.mid == pytest.approx(plain.hours.mid / 0.8)
    assert lossy.hours.high == pytest.approx(plain.hours.high / 0.5)
    assert lossy.usd.mid == pytest.approx(plain.usd.mid / 0.8 / 0.5)


def test_more_nodes_fail_more_often():
    terms = replace(TERMS, goodput=None)
    small, large = (terms.goodput_of(CATALOG.cluster(f"p5.48xlarge:{nodes}")) for nodes in (1, 512))
    assert large.low < large.mid < large.high < small.high < 1.0
    assert large.mid < small.mid


def test_llama_3_had_more_than_nine_tenths_left():
    """16,384 GPUs: "higher than a 90% effective training time" (arXiv:2407.21783, section 3.3.4)."""
    left = replace(TERMS, goodput=None).goodput_of(CATALOG.cluster("p5.48xlarge:2048"))
    assert 0.6 < left.low < 0.9 < left.mid < 0.95 < left.high < 1


def test_an_owner_pays_for_electricity(tmp_path, best):
    file = tmp_path / "own.toml"
    file.write_text('[instances."p5.48xlarge".prices]\nowned = { value = 10, unit = "USD/h" }\n')
    mine = replace(REQUEST, cluster=load_catalog(file).cluster("p5.48xlarge:4"))
    cost = outcome(mine, best, replace(TERMS, basis="owned"), CALIBRATION).within90
    assert cost.usd.mid == pytest.approx(cost.hours.mid * 40 + cost.kwh.mid * 0.07)


def test_no_price_is_no_dollars_and_a_wrong_basis_an_error(best):
    unpriced = replace(REQUEST, cluster=CATALOG.cluster("dgx-h100:4"))
    assert outcome(unpriced, best, TERMS, CALIBRATION).within90.usd is None
    with pytest.raises(ConfigError, match="basis: no spot price of dgx-h100"):
        outcome(unpriced, best, replace(TERMS, basis="spot"), CALIBRATION)


def test_parts_sum_to_the_step_and_skew_is_a_part_of_its_own():
    found = search(replace(REQUEST, seq_len=32768, global_batch=32), CALIBRATION)
    skewed = next(one for one in found.candidates if one.setup.skew > 1.0)
    parts = breakdown(skewed, CALIBRATION)
    assert sum(parts.values()) == pytest.approx(skewed.step.step_s)
    assert parts["busiest rank"] > 0
    assert "busiest rank" not in breakdown(
        skewed._replace(setup=replace(skewed.setup, skew=1.0)), CALIBRATION
    )


def test_swings_hold_the_amount_and_come_widest_first(best):
    result = outcome(REQUEST, best, TERMS, CALIBRATION)
    swings = sensitivity(result, CALIBRATION)
    assert [one.name for one in swings][:1] == ["MFU"]
    assert all(one.low <= result.within90.usd.mid <= one.high for one in swings)
    widths = [one.high - one.low for one in swings]
    assert widths == sorted(widths, reverse=True)


def test_utilisation_is_flops_over_peak(best):
    flops = 3 * REQUEST.shape.forward_flops(4096).total * 256 * 4096
    assert utilisation(REQUEST, 2.0) == pytest.approx(flops / 2.0 / (32 * 989e12), rel=0.01)


def test_the_front_keeps_what_nothing_beats():
    rows = [(1.0, 5.0, 2.0), (2.0, 4.0, 2.0), (2.0, 5.0, 2.0), (1.0, 5.0, 2.0), (3.0, 4.0, 2.0)]
    assert undominated(rows) == [True, True, False, True, False]


def test_clusters_without_a_layout_are_told(best):
    tiny = replace(REQUEST, cluster=CATALOG.cluster("p4d.24xlarge:1"))
    points = front(
        [outcome(REQUEST, best, TERMS, CALIBRATION)], [*on_fewer_nodes(REQUEST), tiny], CALIBRATION, TERMS
    )
    names = [str(one.request.cluster) for one in points.outcomes]
    assert names[0] == "p5.48xlarge:4"
    assert set(names) | points.refused.keys() == {
        "p5.48xlarge:4",
        "p5.48xlarge:2",
        "p5.48xlarge:1",
        "p4d.24xlarge:1",
    }
    assert "the smallest needs" in points.refused["p4d.24xlarge:1"]


@pytest.mark.parametrize("cluster", ["p5.48xlarge:4", "trn2.48xlarge:4", "trn3-gen2-ultraserver:1"])
def test_every_assumption_has_a_source(cluster):
    request = replace(REQUEST, cluster=CATALOG.cluster(cluster), global_batch=1152)
    made = answer(Question("Qwen3-30B-A3B", request, TERMS, "a test"), CALIBRATION)
    assert all(one.name and one.value and one.source and one.confidence for one in made.assumptions)
    told = any("no published run of this chip" in line for line in made.unmeasured)
    assert told == (not cluster.startswith("p5"))


def test_machines_that_cost_nothing_an_hour_have_no_price_to_swing(tmp_path, best):
    file = tmp_path / "own.toml"
    file.write_text('[instances."p5.48xlarge".prices]\nowned = { value = 0, unit = "USD/h" }\n')
    mine = replace(REQUEST, cluster=load_catalog(file).cluster("p5.48xlarge:4"))
    swings = sensitivity(outcome(mine, best, replace(TERMS, basis="owned"), CALIBRATION), CALIBRATION)
    assert "price" not in {one.name for one in swings}
