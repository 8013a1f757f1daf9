"""Chips, links, instances and clusters answer from their figures, ranges kept."""

from dataclasses import replace

import pytest

from anabranch.errors import ConfigError
from anabranch.hardware.chip import Chip
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Cluster, Instance
from anabranch.hardware.link import Link
from anabranch.hardware.price import Price


def figure(low, unit, high=None):
    return Figure(low, low if high is None else high, unit, "this test", "measured")


CHIP = Chip(
    "toy", "toys", {"bf16": figure(100.0, "TFLOP/s"), "fp8": figure(200.0, "TFLOP/s")},
    figure(32.0, "GiB"), figure(1000.0, "GB/s"), figure(400.0, "W", 600.0),
)  # fmt: skip
TORUS = Link("torus", figure(512.0, "GB/s"), 16, (4, 4))
RACK = Link("ring", figure(128.0, "GB/s"), 64, (4,))
NODE = Instance(
    "toy.64", CHIP, 64, (TORUS, RACK), figure(25.0, "GB/s"), figure(1000.0, "W", 2000.0),
    {"on-demand": Price("on-demand", figure(10.0, "USD/h", 12.0), (figure(8.0, "USD/h"),))},
)  # fmt: skip


def test_a_cluster_sums_up_its_nodes_and_keeps_ranges():
    cluster = Cluster(NODE, 3)
    assert (cluster.chips, cluster.domain, str(cluster)) == (192, 64, "toy.64:3")
    price = cluster.price_per_hour("on-demand")
    assert (price.low, price.mid, price.high, price.unit) == (30.0, 33.0, 36.0, "USD/h")
    assert NODE.price("on-demand").seen == (8.0, 12.0)
    power = cluster.power_w
    assert power is not None and (power.low, power.high) == (3 * (64 * 400 + 1000), 3 * (64 * 600 + 2000))


def test_a_group_is_bound_by_the_outermost_level_it_crosses():
    cluster = Cluster(NODE, 2)
    assert [cluster.link(n) for n in (2, 16, 17, 64)] == [TORUS, TORUS, RACK, RACK]
    assert cluster.link(65) == cluster.scale_out == Link("switched", figure(25.0, "GB/s"), 128)
    with pytest.raises(ConfigError, match="128"):
        cluster.link(129)


@pytest.mark.parametrize(
    ("link", "hops"),
    [
        (Link("switched", figure(1.0, "GB/s"), 8), 1.0),
        (Link("mesh", figure(1.0, "GB/s"), 4), 1.0),
        (Link("ring", figure(1.0, "GB/s"), 4, (4,)), 4 / 3),
        (Link("ring", figure(1.0, "GB/s"), 5, (5,)), 6 / 4),
        (Link("torus", figure(1.0, "GB/s"), 16, (4, 4)), 32 / 15),
    ],
)
def test_forwarding_in_a_torus_takes_its_share_of_the_links(link, hops):
    assert link.hops == pytest.approx(hops)
    assert link.all_to_all_gb_per_s.mid == pytest.approx(1 / hops)


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: CHIP.peak_tflops("fp4"), "precision: .*no fp4 peak of toy; it has bf16, fp8"),
        (
            lambda: NODE.price("spot"),
            r"basis: no spot price of toy.64 .*it has on-demand.*toy.64\".prices.spot",
        ),
        (lambda: Cluster(NODE, 0), "nodes: 0"),
        (lambda: Cluster(Instance("pc", CHIP, 1, (), None), 2), "nodes: .*scale_out"),
        (lambda: Link("star", figure(1.0, "GB/s"), 4), "topology: 'star'"),
        (lambda: Link("torus", figure(1.0, "GB/s"), 16), "shape: "),
        (lambda: Link("switched", figure(1.0, "GB/s"), 16, (4, 4)), "shape: "),
        (lambda: replace(NODE, scale_up=(RACK, TORUS)), "scale_up: .*4 of 1 are not 64"),
        (lambda: replace(NODE, scale_up=(TORUS, TORUS)), "scale_up: a level of 16 chips on one of 16"),
        (lambda: replace(NODE, chips=96), "chips: 96 .*domains of 64"),
    ],
)
def test_what_is_not_known_or_cannot_be_is_said(ask, told):
    with pytest.raises(ConfigError, match=told):
        ask()
