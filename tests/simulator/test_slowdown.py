"""The slowdown by natural skew, by prices of published hardware and of measured ranks."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.costs.call import CallModel
from anabranch.costs.training.calibration import load_calibration
from anabranch.costs.training.setup import Setup
from anabranch.hardware.catalog import load_catalog
from anabranch.placement.choice import Exchange
from anabranch.simulator.histogram import histogram_of, natural_histogram
from anabranch.simulator.skew import Group, Policy, mean_skew, place
from anabranch.simulator.slowdown import LivePrices, PublishedPrices, ranking, slowdowns
from anabranch.telemetry.samples import INTER, INTRA, CallSample, Samples
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout

QWEN = read_shape("Qwen3-30B-A3B")
LAYOUT = Layout(seq_len=4096, global_batch=512, ep=16, dp=64)
PUBLISHED = PublishedPrices(
    Setup(QWEN, load_catalog().cluster("trn2.48xlarge:4"), LAYOUT), load_calibration()
)
GROUP = Group.of(QWEN, LAYOUT)
EVEN = histogram_of(np.full((1, 128), 0.5), np.zeros(1, dtype=np.int64), "even")
# A layer whose guests, exchange and planning cost round numbers: 1 ms for 1000 rows, 1 ms for a megabyte.
SAMPLES = Samples(
    hidden=250, experts=32, top_k=8, node_R=(0, 0, 1, 1), row_bytes=1000, dispatch_row_bytes=1000,
    combine_row_bytes=1000, expert_bytes=100_000,
    link_ms={INTRA: {0: 0.0, 1_000_000: 1.0}, INTER: {0: 0.0, 1_000_000: 5.0}},
    expert_ms={0: 0.0, 10_000: 10.0}, copy_ms_per_mb=0.0, plan_ms={"static": 0.0, "exact": 0.1, "bounded": 0.1},
    call_ms=(CallSample("all_to_all", 1, 512, 100.0), CallSample("all_to_all", 1, 1024, 200.0)),
)  # fmt: skip
LIVE = LivePrices(CallModel(SAMPLES), rest_ms=50.0, layers=4, exchange=Exchange("all_to_all"))


def test_even_popularity_costs_next_to_nothing() -> None:
    (slowdown,) = slowdowns([Policy()], EVEN, GROUP, PUBLISHED)
    assert 0.99 < slowdown.throughput < 1.0


def test_static_slowdown_is_that_of_its_skew() -> None:
    """Without guests the step is what the calibrated model says of that max/mean."""
    popularity = natural_histogram(128)
    (slowdown,) = slowdowns([Policy()], popularity, GROUP, PUBLISHED)
    skew = mean_skew(place(popularity, GROUP, Policy()))
    told = PUBLISHED.calibration.predict([replace(PUBLISHED.setup, skew=s) for s in (1.0, skew)])
    assert skew > 1.3
    assert slowdown.throughput == pytest.approx(told[0].step_s / told[1].step_s)


def test_balance_pays_where_guests_are_cheap_and_not_where_they_are_dear() -> None:
    policies = [Policy("static"), Policy("exact")]
    near = slowdowns(policies, natural_histogram(128), GROUP, PUBLISHED)
    assert ranking(near) == ["exact", "static"]
    # Guests over the network between nodes, for micro-batches of 256 tokens.
    few = replace(LAYOUT, seq_len=256, ep=64)
    far = replace(PUBLISHED, setup=replace(PUBLISHED.setup, layout=few))
    assert ranking(slowdowns(policies, natural_histogram(128), Group.of(QWEN, few), far)) == [
        "static",
        "exact",
    ]


def test_the_break_even_is_where_a_guest_costs_its_rows() -> None:
    rows = PUBLISHED.guest_rows
    parts = PUBLISHED.parts_s()
    step_rows = LAYOUT.tokens * QWEN.experts.top_k * QWEN.moe_layers / LAYOUT.chips
    calls = LAYOUT.micro_batches * QWEN.moe_layers
    saved_s = rows * calls * (parts["experts"] + parts["rows"]) / step_rows
    assert saved_s == pytest.approx(PUBLISHED.guest_s, rel=0.01)


def test_live_prices_scale_experts_and_exchange_only() -> None:
    popularity, group = natural_histogram(32), Group(4, 512, 8)
    static, exact = slowdowns([Policy(), Policy("exact")], popularity, group, LIVE)
    assert static.balanced_s == pytest.approx(0.050 + 4 * 0.100)
    skew = mean_skew(place(popularity, group, Policy()))
    # 4096 rows of computation a rank; the rest of the 100 ms is exchange, or does not depend on rows.
    slower_s = static.step_s - static.balanced_s
    assert slower_s > 4 * (skew - 1) * 4.096e-3
    assert slower_s < (skew - 1) * 4 * 0.100
    assert ranking([static, exact]) == ["exact", "static"]


def test_hotter_is_slower() -> None:
    def throughput(hot: int) -> float:
        counts = np.ones((1, 32))
        counts[0, :8] = hot
        popularity = histogram_of(counts, np.zeros(1, dtype=np.int64), "hot")
        return slowdowns([Policy()], popularity, Group(4, 512, 8), LIVE)[0].throughput

    found = [throughput(hot) for hot in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4
