"""The saving of one cluster over another: closed forms where there are any, and what is not claimed."""

import json
import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from anabranch.costs.bounds import Bounds, exactly
from anabranch.costs.training.calibration import Interval, Prediction
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.figure import Figure
from anabranch.hardware.price import Price
from anabranch.planner.compare import Offer, compare, log_steps, triangular

SCORES = {share: NormalDist().inv_cdf((1 + share) / 2) for share in (0.8, 0.9)}


def usd(value, date="2026-10"):
    return Figure(value, value, "USD/h", "a quote", "user", date)


def prediction(step_s, sigma):
    """Log-normal: its intervals are those of a normal logarithm."""
    ends = [Interval(*(step_s * math.exp(sign * sigma * z) for sign in (-1, 1))) for z in SCORES.values()]
    return Prediction(step_s, *ends)


def offer(name="a", price=10.0, step_s=10.0, sigma=0.0, **others):
    fields = {"chips": 8, "nodes": 1, "mfu": 0.4, "unseen": False} | others
    return Offer(name, price=Price("on-demand", usd(price)), step=prediction(step_s, sigma), **fields)


def test_certain_offers_save_exactly_what_they_cost_less():
    answer = compare(offer(price=6.0, step_s=8.0), offer(price=10.0, step_s=10.0), draws=10)
    assert answer.median == answer.within90.low == answer.within90.high == pytest.approx(0.52)
    assert answer.goal_probability == answer.cheaper_probability == 1.0


def test_log_normal_steps_give_the_closed_form():
    """The cost ratio is log-normal with the sum of variances."""
    left, right = offer(price=5.0, sigma=0.3), offer(sigma=0.4)
    answer, ratio = compare(left, right), NormalDist(math.log(0.5), 0.5)
    for share, within in ((0.8, answer.within80), (0.9, answer.within90)):
        expected = [1 - math.exp(ratio.inv_cdf(p)) for p in ((1 + share) / 2, (1 - share) / 2)]
        assert within == pytest.approx(expected, abs=0.02)
    assert answer.median == pytest.approx(0.5, abs=0.01)
    assert answer.goal_probability == pytest.approx(ratio.cdf(math.log(0.6)), abs=0.01)
    assert answer.shares.step == 1.0


def test_errors_of_one_kind_cancel():
    left, right = offer(price=5.0, sigma=0.3), offer(sigma=0.3)
    assert compare(left, right, correlation=1.0).within90 == pytest.approx((0.5, 0.5))
    apart, alone = compare(left, right, correlation=-1.0), compare(left, right)
    assert apart.within90.low < alone.within90.low


def test_draws_have_the_calibrations_intervals_at_their_shares():
    step = Prediction(10.0, Interval(8.0, 11.0), Interval(5.0, 20.0))
    drawn = np.exp(log_steps(step, np.array([-SCORES[0.9], -SCORES[0.8], 0.0, SCORES[0.8], SCORES[0.9]])))
    assert drawn == pytest.approx([5.0, 8.0, 10.0, 11.0, 20.0])


@pytest.mark.parametrize("bounds", [Bounds(1.0, 2.0, 4.0), Bounds(1.0, 1.0, 4.0), Bounds(1.0, 4.0, 4.0)])
def test_triangular_quantiles_have_its_mean_and_its_ends(bounds):
    quantiles = (np.arange(100_000) + 0.5) / 100_000
    drawn = triangular(bounds, quantiles)
    assert drawn.mean() == pytest.approx(sum(bounds) / 3, rel=1e-4)
    assert np.all(np.diff(drawn) >= 0) and drawn[0] >= 1.0 and drawn[-1] <= 4.0


def test_prices_of_other_dates_widen_the_saving_around_todays():
    price = Price("on-demand", usd(10.0), (usd(8.0, "2024-11"),))
    answer = compare(offer(price=5.0), replace(offer(), price=price))
    assert 1 - 5 / 8 < answer.within90.low < answer.within90.high < 1 - 5 / 10
    assert answer.shares.price == 1.0
    assert any("2024-11 to 2026-10" in caveat for caveat in answer.caveats)


def test_failures_count():
    left = offer(price=5.0, goodput=exactly(0.5))
    assert compare(left, offer(), draws=10).median == pytest.approx(0.0)


def test_conditions_are_where_the_goal_is_just_met():
    left, right = offer(price=9.0, step_s=9.0, sigma=0.2, mfu=0.3), offer(sigma=0.1)
    needs = compare(left, right).conditions
    cheap = replace(left, price=Price("on-demand", usd(10.0 * needs.price_for_goal)))
    assert compare(cheap, right).median == pytest.approx(0.4, abs=0.01)
    sure = replace(left, price=Price("on-demand", usd(10.0 * needs.price_for_sure)))
    assert compare(sure, right).goal_probability == pytest.approx(0.9, abs=0.01)
    quick = replace(left, step=prediction(9.0 * needs.mfu_ratio / needs.mfu_for_goal, 0.2))
    assert compare(quick, right).median == pytest.approx(0.4, abs=0.01)
    assert needs.possible
    impossible = compare(replace(left, mfu=0.9), right)
    assert not impossible.conditions.possible and impossible.conditions_told[1].endswith("cannot be")


def test_on_the_mfu_curve_costs_are_even():
    left, right = offer(price=9.0, step_s=9.0, mfu=0.3), offer()
    point = next(at for at in compare(left, right).mfu_curve(10) if at.right == pytest.approx(0.4))
    even = replace(left, step=prediction(9.0 * 0.3 / point.even.mid, 0.0))
    assert compare(even, right, draws=10).median == pytest.approx(0.0)
    assert point.goal.mid == pytest.approx(point.even.mid / 0.6)


def test_nothing_is_claimed_of_a_chip_without_runs():
    unseen = compare(offer("trn2", price=5.0, unseen=True), offer("p5"))
    assert not unseen.supported and unseen.verdict.startswith("no saving is claimed")
    assert any("trn2: no published run" in caveat for caveat in unseen.caveats)
    assert compare(offer(price=5.0), offer()).verdict.startswith("a saves 50%")


def test_a_seed_gives_the_same_figures_and_they_are_json():
    left, right = offer(price=5.0, sigma=0.3), offer(sigma=0.4)
    first, again, other = (compare(left, right, draws=500, seed=seed).to_json() for seed in (1, 1, 2))
    assert first == again != other
    assert json.loads(json.dumps(first))["conditions"]["goal"] == 0.4


def test_prices_of_the_catalog_are_taken_with_their_history():
    price = load_catalog().instance("p5.48xlarge").price("capacity-block")
    two = replace(offer(), price=price, nodes=2)
    assert two.usd_per_h == pytest.approx((78.66, 95.52, 95.52))


@pytest.mark.parametrize(
    ("change", "named"), [({"mfu": 0.0}, "mfu"), ({"goodput": Bounds(0.9, 0.8, 1.0)}, "goodput")]
)
def test_what_cannot_be_is_named(change, named):
    with pytest.raises(ConfigError, match=rf"^{named}: "):
        offer(**change)
    with pytest.raises(ConfigError, match=r"^goal: "):
        compare(offer(), offer(), goal=1.0)
