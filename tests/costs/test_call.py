"""The price of a call, fitted to the samples of a made-up machine whose times follow formulas of their own."""

from dataclasses import replace

import numpy as np
import pytest
from tests.telemetry.test_samples import made_up_samples

from anabranch.costs.calibrate import Calibration
from anabranch.costs.call import CallModel
from anabranch.costs.prices import CalibratedPrices
from anabranch.costs.traffic import Flow
from anabranch.errors import ConfigError
from anabranch.placement.assign import send_RE
from anabranch.placement.base import Homes, Plan
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.choice import Exchange
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.nodes import Nodes
from anabranch.placement.static import StaticPlanner
from anabranch.placement.within_node import WithinNode
from anabranch.telemetry.samples import CallSample
from anabranch.workload.routing import routing_counts

RANKS, EXPERTS, TOP_K = 4, 16, 4
NODES, HOMES = Nodes.of("aabb"), Homes.contiguous(EXPERTS, RANKS)
PLAN_MS = {"static": 0.25, "bounded": 0.5, "exact": 0.75, "exact_within_node": 1.0}
EXCHANGES = [
    Exchange("all_to_all"),
    Exchange("dedup"),
    Exchange("two_level"),
    Exchange("all_to_all", 2),
    Exchange("two_level", 4),
    Exchange("transformers"),
]
ROW, DISPATCH_ROW, COMBINE_ROW, EXPERT = 256, 66, 128, 98304
# ms of latency, ms a byte that each of all ranks sends at once.
LINKS = {"intra": (0.25, 2e-6), "inter": (0.5, 4e-5)}
COPY_MS_PER_MB = 0.5
# Bytes sent one way alone take this part of the time they take with as many coming back.
DUPLEX = 0.7
# Of what chunks could hide, this part is hidden.
HIDDEN = 0.6


def _link_ms(name, sent_bytes):
    return LINKS[name][0] + LINKS[name][1] * max(sent_bytes - 1024, 0.0)


def _exchange_ms(rows_RR, row_bytes, classes=("intra", "inter")):
    """Node by node, rank by rank."""
    worst = dict.fromkeys(classes, 0.0)
    for node in range(2):
        for name in classes:
            out = into = 0.0
            for s in range(RANKS):
                for d in range(RANKS):
                    near = NODES.node_R[s] == NODES.node_R[d]
                    if s == d or near != (name == "intra"):
                        continue
                    out += rows_RR[s, d] * (NODES.node_R[s] == node)
                    into += rows_RR[s, d] * (NODES.node_R[d] == node)
            more, less = max(out, into), min(out, into)
            turn = (more - less) * (DUPLEX if name == "inter" else 1) + less
            worst[name] = max(worst[name], _link_ms(name, turn / 2 * row_bytes))
    return max(worst.values())


def _experts_ms(rows):
    return 0.5 + 0.004 * max(rows - 16, 0)


def _overhead_ms(exchange, tokens):
    """A further chunk costs the host what the smallest measured call did."""
    fixed = {"all_to_all": 1.0, "dedup": 2.0, "two_level": 3.0, "transformers": 1.5}[exchange.transport]
    return fixed + 0.001 * tokens + (exchange.chunks - 1) * (fixed + 0.001 * 128)


def _hops(plan, transport):
    """(rows, row bytes there, row bytes back, words a row, classes) of each exchange."""
    if transport in ("all_to_all", "transformers"):
        rows_RR = np.stack([send_RE(plan, rank).sum(axis=1) for rank in range(RANKS)])
        wire = (DISPATCH_ROW, COMBINE_ROW) if transport == "all_to_all" else (ROW, ROW)
        return [(rows_RR, *wire, 0, ("intra", "inter"))]
    hops = Flow(plan, NODES, TOP_K).hops(transport)
    if transport == "dedup":
        return [(hops[0].rows_RR, DISPATCH_ROW, COMBINE_ROW, TOP_K, ("intra", "inter"))]
    return [
        (hops[0].rows_RR, DISPATCH_ROW, COMBINE_ROW, TOP_K, ("inter",)),
        (hops[1].rows_RR, ROW, ROW, TOP_K, ("intra",)),
    ]


def _true_ms(plan, exchange, planner=None):
    chunks, hops = exchange.chunks, _hops(plan, exchange.transport)
    copied_R = plan.rows_R + sum(hop[0].sum(axis=1) for hop in hops)
    dispatch = combine = 2 * COPY_MS_PER_MB * copied_R.max() * ROW / 1e6 / chunks
    for rows_RR, there, back, words, classes in hops:
        dispatch += _exchange_ms(rows_RR / chunks, there + 8 * words, classes)
        dispatch += _exchange_ms(rows_RR.T / chunks, there + 4 * words, classes)
        combine += _exchange_ms(rows_RR.T / chunks, back, classes) + _exchange_ms(
            rows_RR / chunks, back, classes
        )
    experts = _experts_ms(plan.rows_R.max() / chunks)
    total = chunks * (dispatch + experts + combine) - HIDDEN * (chunks - 1) * min(dispatch + combine, experts)
    if plan.guests:
        lent_RR = np.zeros((RANKS, RANKS))
        for host, expert in np.argwhere(plan.guest_RE):
            lent_RR[HOMES.rank_E[expert], host] += 1
        total += _exchange_ms(lent_RR, EXPERT) + _exchange_ms(lent_RR.T, EXPERT)
        total += 2 * COPY_MS_PER_MB * lent_RR.sum(axis=1).max() * EXPERT / 1e6
    tokens = plan.counts_RE.sum(axis=1).max() / TOP_K
    planned = 0.0 if exchange.transport == "transformers" else PLAN_MS[planner]
    return total + planned + _overhead_ms(exchange, tokens)


def _plan(planner, workload="balanced", tokens=512, max_mean=1.0, step=0):
    sizes = {"ranks": RANKS, "experts": EXPERTS, "tokens": tokens, "top_k": TOP_K, "step": step}
    return planner.plan(routing_counts(workload, **sizes, max_mean=max_mean), HOMES)


def machine_samples(noise=0.0, **changes):
    """What would be measured on the machine, each time off by up to `noise`."""
    rng = np.random.default_rng(0)

    def seen(ms):
        return float(ms * (1 + noise * rng.uniform(-1, 1)))

    sizes = [1024 * 4**step for step in range(8)]
    return made_up_samples(
        link_ms={name: {size: seen(_link_ms(name, size)) for size in sizes} for name in LINKS},
        one_way_ms={sizes[-1]: _link_ms("inter", 1024 + DUPLEX * (sizes[-1] - 1024))},
        alone_ms={},
        expert_alone_ms={},
        expert_ms={rows: seen(_experts_ms(rows)) for rows in (16, 128, 1024, 4096, 8192)},
        plan_ms=PLAN_MS,
        call_ms=tuple(
            CallSample(
                *exchange, tokens, seen(_true_ms(_plan(StaticPlanner(), tokens=tokens), exchange, "static"))
            )
            for exchange in EXCHANGES
            for tokens in (128, 1024)
        ),
        **changes,
    )


PLANNERS = [
    StaticPlanner(),
    BoundedPlanner(0.05, 4),
    ExactPlanner(),
    WithinNode(ExactPlanner(), NODES),
]
HELD_OUT = [("W1", 400, 2.0), ("W2", 900, 2.5), ("W3", 64, 1.5), ("W4", 700, 1.8), ("W5", 1500, 1.9)]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: f"{e.transport}/{e.chunks}")
def test_held_out_plans_are_predicted(exchange):
    exactly, noisily = CallModel(machine_samples()), CallModel(machine_samples(noise=0.005))
    for workload, tokens, max_mean in HELD_OUT:
        for planner in PLANNERS:
            plan = _plan(planner, workload, tokens, max_mean)
            truth = _true_ms(plan, exchange, planner.name)
            assert exactly.cost(plan, exchange, planner.name).total_ms == pytest.approx(truth, rel=1e-6)
            assert noisily.cost(plan, exchange, planner.name).total_ms == pytest.approx(truth, rel=0.02)


def test_the_parts_of_a_call():
    model = CallModel(machine_samples())
    plan = _plan(ExactPlanner(), "W2", 512, 2.0)
    cost = model.cost(plan, Exchange("all_to_all"), "exact")
    assert min(cost) > 0
    assert sum(cost[:-1]) == pytest.approx(cost.total_ms, abs=1e-5)
    assert cost.plan_ms == PLAN_MS["exact"]
    assert cost.experts_ms == pytest.approx(_experts_ms(plan.rows_R.max()))
    assert cost.overhead_ms == pytest.approx(1.0 + 0.512)
    assert model.cost(_plan(StaticPlanner()), Exchange("all_to_all"), "static").weights_ms == 0.0


def test_chunks_hide_what_is_not_the_slowest():
    model = CallModel(machine_samples())
    plan = _plan(StaticPlanner(), "W2", 1000, 2.0)
    cost = model.cost(plan, Exchange("two_level", 4), "static")
    hidden = HIDDEN * 0.75 * min(cost.dispatch_ms + cost.combine_ms, cost.experts_ms)
    assert cost.overhead_ms == pytest.approx(_overhead_ms(Exchange("two_level", 4), 1000) - hidden, rel=1e-5)
    assert sum(cost[:-1]) == pytest.approx(cost.total_ms)


def test_no_more_is_hidden_than_could_be_beyond_the_measured_sizes():
    samples = machine_samples()
    whole = {c.tokens: c for c in samples.call_ms if c.transport == "two_level" and c.chunks == 1}
    small, large = sorted(whole)[0], sorted(whole)[-1]

    def measured(call):
        # In 4 chunks the small size hides nothing, and the large one most of what it could.
        if call.transport != "two_level" or call.chunks != 4:
            return call
        return call._replace(ms=call.ms * (1.0 if call.tokens < large else 0.8))

    model = CallModel(replace(samples, call_ms=tuple(measured(call) for call in samples.call_ms)))
    table = model._overhead[Exchange("two_level", 4)]
    assert table.hidden[small] < table.hidden[large] <= 1.0
    plan = _plan(StaticPlanner(), "W2", 40 * large, 2.0)
    cost = model.cost(plan, Exchange("two_level", 4), "static")
    could = 0.75 * min(cost.dispatch_ms + cost.combine_ms, cost.experts_ms)
    slope = (table.ms[large] - table.ms[small]) / (large - small)
    assert cost.overhead_ms >= table.ms[large] + slope * 39 * large - could - 1e-6


def test_more_rows_never_cost_less():
    model, plan = CallModel(machine_samples(noise=0.05)), _plan(ExactPlanner(), "W1", 64, 2.0)
    for exchange in EXCHANGES:
        costs = [
            model.cost(
                Plan(plan.counts_RE * n, plan.quota_RE * n, HOMES, plan.cap * n), exchange, "exact"
            ).total_ms
            for n in (1, 2, 3, 5, 8, 40, 300)
        ]
        assert costs == sorted(costs)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: f"{e.transport}/{e.chunks}")
def test_no_rows_cost_latency_and_overhead_only(exchange):
    nothing = np.zeros((RANKS, EXPERTS), dtype=np.int64)
    cost = CallModel(machine_samples()).cost(Plan(nothing, nothing, HOMES, 0), exchange, "static")
    latency = sum(LINKS[name][0] for name in ("inter", "intra")) if exchange.transport == "two_level" else 0.5
    assert cost.dispatch_ms == pytest.approx(2 * latency * exchange.chunks)
    assert cost.combine_ms == pytest.approx(cost.dispatch_ms)
    assert cost.experts_ms == pytest.approx(0.5 * exchange.chunks)
    assert cost.weights_ms == 0.0


def test_a_call_measured_faster_than_its_parts_hides_the_exchange_at_most():
    calls = tuple(CallSample(*exchange, tokens, 1e-3) for exchange in EXCHANGES for tokens in (128, 1024))
    model = CallModel(machine_samples().__class__(**{**vars(machine_samples()), "call_ms": calls}))
    for tokens in (8, 128, 1024, 100_000):
        plan = _plan(StaticPlanner(), "W3", tokens, 1.5)
        for exchange in EXCHANGES:
            cost = model.cost(plan, exchange, "static")
            assert cost.total_ms >= cost.experts_ms / exchange.chunks
            assert cost.total_ms >= _experts_ms(plan.rows_R.max() / exchange.chunks) * exchange.chunks - 1e-6


def test_the_break_even_of_a_guest():
    prices = CalibratedPrices(machine_samples())
    for across, name in ((False, "intra"), (True, "inter")):
        # All ranks take part, so that the slow links' latency counts even where nothing crosses them.
        link = _link_ms(name, EXPERT / 2 * (DUPLEX if across else 1))
        lend = 2 * (max(link, LINKS["inter"][0]) + COPY_MS_PER_MB * EXPERT / 1e6)
        rate = (_experts_ms(8192) - _experts_ms(16)) / (8192 - 16)
        assert prices.guest_rows(across_nodes=across) == round(lend / rate)
    assert prices.guest_rows(across_nodes=True) > prices.guest_rows(across_nodes=False)


def test_a_lender_that_is_as_slow_alone_as_its_whole_node_needs_more_rows_for_a_guest():
    samples = machine_samples()
    bound = {name: {max(table): table[max(table)]} for name, table in samples.link_ms.items()}
    prices, alone = CalibratedPrices(samples), CalibratedPrices(replace(samples, alone_ms=bound))
    rate = (_experts_ms(8192) - _experts_ms(16)) / (8192 - 16)
    for across, name in ((False, "intra"), (True, "inter")):
        link = max(_link_ms(name, EXPERT), LINKS["inter"][0])
        lend = 2 * (link + COPY_MS_PER_MB * EXPERT / 1e6)
        assert alone.guest_rows(across_nodes=across) == pytest.approx(lend / rate, abs=1)
    assert alone.guest_rows(across_nodes=True) > prices.guest_rows(across_nodes=True)


def test_without_such_a_rank_a_guest_there_costs_nothing(tmp_path):
    intra = {"intra": machine_samples().link_ms["intra"]}
    alone = made_up_samples(node_R=(0, 0), link_ms=intra)
    prices = Calibration(tmp_path).prices(alone)
    assert prices.guest_rows(across_nodes=True) == 0
    assert prices.guest_rows(across_nodes=False) > 0


def test_what_was_not_measured_is_named():
    model, plan = CallModel(machine_samples()), _plan(StaticPlanner())
    with pytest.raises(ConfigError, match="dedup/2 was not measured"):
        model.cost(plan, Exchange("dedup", 2), "static")
    with pytest.raises(ConfigError, match="'tarot' was not measured"):
        model.cost(plan, Exchange("dedup"), "tarot")


def test_transformers_own_exchange_is_planned_by_nobody():
    model, plan = CallModel(machine_samples()), _plan(StaticPlanner(), "W2", 512, 2.0)
    cost = model.cost(plan, Exchange("transformers"), "nobody")
    assert cost.plan_ms == 0.0
    # Its rows travel as they are.
    assert cost.dispatch_ms > model.cost(plan, Exchange("all_to_all"), "static").dispatch_ms
