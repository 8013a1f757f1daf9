"""Every part of a run's cost by its formula, and bounds that are in order."""

import math

import numpy as np
import pytest

from anabranch.costs.bounds import Bounds, exactly
from anabranch.costs.energy import power_of
from anabranch.costs.ownership import (
    HOURS_PER_YEAR,
    Engineering,
    Occupation,
    owned,
    ownership,
    rented,
)
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.figure import Figure

CATALOG = load_catalog()
CLUSTER = CATALOG.cluster("p5.48xlarge:2")
POWER = power_of(CLUSTER, CATALOG.figure("pue"))
RENT = rented("capacity-block", CLUSTER.price_per_hour("capacity-block"))
ELECTRICITY = Figure(0.07, 0.07, "USD/kWh", "a contract", "user")


def test_a_flawless_run_costs_its_hours():
    bill = ownership(Occupation(exactly(10.0), 0.4), RENT, POWER)
    assert bill.total == exactly(pytest.approx(2 * 47.76 * 10))
    assert bill.energy == exactly(0.0) and bill.kwh.mid > 0
    assert any("engineering" in note for note in bill.notes)


def test_failures_and_idle_hours_are_paid_for():
    run = Occupation(exactly(90.0), 0.4, goodput=exactly(0.9), occupancy=0.5)
    bill = ownership(run, RENT, POWER)
    hours = [part.mid for part in (bill.hours.productive, bill.hours.failures, bill.hours.idle)]
    assert hours == pytest.approx([90.0, 10.0, 100.0])
    assert bill.machines.idle.mid == pytest.approx(95.52 * 100.0)
    assert bill.total.mid == pytest.approx(95.52 * 200.0)


def test_low_takes_the_best_of_all_and_high_the_worst():
    run = Occupation(Bounds(9.0, 10.0, 12.0), 0.4, goodput=Bounds(0.8, 0.9, 1.0))
    price = Figure(30.0, 50.0, "USD/h", "two quotes", "user")
    total = ownership(run, rented("spot", price), POWER).total
    assert total == pytest.approx((9.0 * 30.0, 10.0 / 0.9 * 40.0, 12.0 / 0.8 * 50.0))


def test_owners_pay_for_capital_and_electricity():
    run = Occupation(exactly(100.0), 0.4, occupancy=0.8)
    bill = ownership(run, owned(600_000.0, 4.0, ELECTRICITY, yearly_upkeep=0.05), POWER)
    assert bill.machines.total.mid == pytest.approx(600_000 * (0.25 + 0.05) / HOURS_PER_YEAR * 125)
    watts = POWER.busy_w(np.array([0.4])).mid[0], float(POWER.waiting_w().mid)
    assert bill.kwh.mid == pytest.approx((watts[0] * 100 + watts[1] * 25) / 1e3)
    assert bill.energy.mid == pytest.approx(0.07 * bill.kwh.mid)


def test_engineering_counts_what_is_given():
    people = Engineering(hours=40.0, usd_per_h=150.0)
    run = Occupation(exactly(1.0), 0.4)
    with_people, without = (ownership(run, RENT, POWER, e) for e in (people, Engineering()))
    assert with_people.total.mid - without.total.mid == pytest.approx(6_000)
    assert not any("engineering" in note for note in with_people.notes)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"goodput": exactly(0.0)}, "goodput"),
        ({"goodput": Bounds(0.9, 1.0, 1.1)}, "goodput"),
        ({"occupancy": 0.0}, "occupancy"),
        ({"utilisation": 1.5}, "utilisation"),
        ({"productive_h": exactly(-1.0)}, "productive_h"),
        ({"productive_h": exactly(math.nan)}, "productive_h"),
    ],
)
def test_what_cannot_be_is_named(settings, named):
    with pytest.raises(ConfigError, match=f"^{named}: "):
        Occupation(**({"productive_h": exactly(1.0), "utilisation": 0.4} | settings))


def test_negative_money_is_named():
    with pytest.raises(ConfigError, match=r"^capital_usd: "):
        owned(-1.0, 4.0, ELECTRICITY)
    with pytest.raises(ConfigError, match=r"^engineering_rate: "):
        Engineering(1.0, -5.0)
