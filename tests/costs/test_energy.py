"""Power of clusters against published measurements, and what is said where no figure is."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.costs.energy import FULL, power_of
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Cluster

RACK = Figure(1.0, 1.0, "ratio", "no building", "user")


@pytest.fixture(scope="module")
def catalog():
    return load_catalog()


def test_an_h100_node_draws_what_was_measured_in_training(catalog):
    power = power_of(catalog.cluster("dgx-h100"), RACK)
    training = power.busy_w(np.array([0.4]))
    assert training.mid[0] == pytest.approx(0.76 * 10_200, rel=0.02)  # arXiv:2506.14551
    assert training.low[0] < 8_400 < training.high[0]  # arXiv:2412.08602, the most
    assert power.busy_w(np.array([1.0])).mid[0] < 10_200  # its rating


def test_single_gpus_draw_what_was_measured_in_inference(catalog):
    """Batch 1 and 128 on one H100 SXM (serialalice.pt): few FLOPs, and many."""
    node = power_of(catalog.cluster("dgx-h100"), RACK)
    gpu = replace(node, idle_w=node.idle_w.scaled(1 / 8), most_w=node.most_w.scaled(1 / 8))
    gpu = replace(gpu, overhead_w=node.overhead_w.scaled(0.0))
    drawn = gpu.busy_w(np.array([0.003, FULL]))
    assert drawn.low[0] < 267 < drawn.high[0]
    assert drawn.low[1] < 680 < drawn.high[1]


def test_power_rises_with_use_and_waiting_is_least(catalog):
    for name in catalog.instances:
        power = power_of(catalog.cluster(name), catalog.figure("pue"))
        busy = power.busy_w(np.linspace(0.0, 1.0, 11))
        assert np.all(np.diff(busy.mid) >= 0) and busy.mid[0] > power.waiting_w().mid
        assert np.all(busy.low < busy.mid) and np.all(busy.mid < busy.high)


def test_nodes_and_buildings_multiply(catalog):
    used = np.array([0.1, 0.5])
    one = power_of(catalog.cluster("trn2.48xlarge"), RACK).busy_w(used)
    four = power_of(catalog.cluster("trn2.48xlarge:4"), replace(RACK, low=1.5, high=1.5)).busy_w(used)
    assert four.mid == pytest.approx(6 * one.mid)
    assert four.high == pytest.approx(6 * one.high)


def test_wider_figures_make_wider_bounds(catalog):
    cluster, used = catalog.cluster("dgx-h100"), np.array([0.4])
    sure, unsure = (
        power_of(cluster, replace(RACK, low=1.2 - d, high=1.2 + d)).busy_w(used) for d in (0, 0.2)
    )
    assert sure.mid == unsure.mid
    assert unsure.low < sure.low and sure.high < unsure.high


def test_kilowatt_hours_are_of_work_and_of_waiting(catalog):
    power = power_of(catalog.cluster("dgx-h100"), RACK)
    used, hours = np.array([0.2, 0.4]), np.array([10.0, 5.0])
    kwh = power.kwh(used, hours, waiting_h=2.0)
    assert kwh.mid == pytest.approx((power.busy_w(used).mid * hours + power.waiting_w().mid * 2.0) / 1e3)


def test_what_no_source_tells_is_assumed_aloud(catalog):
    told = " ".join(power_of(catalog.cluster("trn2.48xlarge"), RACK).assumptions)
    assert "idle power of trainium2" in told and "estimate" in told
    assert len(power_of(catalog.cluster("dgx-h100"), RACK).assumptions) == 1  # the curve alone


def test_without_any_power_there_is_no_energy(catalog):
    instance = catalog.instance("dgx-h100")
    unknown = replace(instance, chip=replace(instance.chip, power_w=None))
    with pytest.raises(ConfigError, match=r"power: .*\[chips.h100\]"):
        power_of(Cluster(unknown), RACK)
    with pytest.raises(ConfigError, match="pue: "):
        power_of(Cluster(instance), replace(RACK, low=0.9))
