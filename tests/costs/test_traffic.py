"""Expected distinct tokens against the tokens themselves, on the stress workloads and on natural routing."""

from pathlib import Path

import numpy as np
import pytest

from anabranch import workload
from anabranch.costs.links import Links
from anabranch.costs.traffic import Flow
from anabranch.errors import ConfigError
from anabranch.placement.assign import send_RE
from anabranch.placement.base import Homes
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.nodes import Nodes
from anabranch.placement.static import StaticPlanner
from anabranch.workload.routing import WORKLOADS, reachable_max_mean, routing_ids
from anabranch.workload.trace import load_trace

NATURAL = load_trace(Path(workload.__file__).parent / "natural_tiny.npz")
PLANNERS = (StaticPlanner(), BoundedPlanner(0.05, 4), ExactPlanner())
# (ranks, experts, top_k, nodes)
SIZES = ((4, 16, 4, 2), (8, 64, 8, 2), (4, 64, 8, 4), (4, 32, 2, 4))


def _hits(plan, rank, ids_SK, place_R):
    """Tokens of `rank` that some rank at each place computes something of: rows of an expert go to destinations
    in rank order, as the transports send them."""
    rank_of_row = [np.repeat(np.arange(plan.homes.ranks), sent_R) for sent_R in send_RE(plan, rank).T]
    rank_SK = np.empty_like(ids_SK)
    rank_SK.reshape(-1)[np.argsort(ids_SK.reshape(-1), kind="stable")] = np.concatenate(rank_of_row)
    hit_SX = np.zeros((ids_SK.shape[0], place_R.max() + 1), dtype=bool)
    hit_SX[np.arange(ids_SK.shape[0])[:, None], place_R[rank_SK]] = True
    return hit_SX.sum(axis=0)


def _errors(ids_R, experts, node_count):
    """Relative errors of cells (a source's tokens at a destination, a tenth of them or more), and of the busiest
    node's traffic, by ranks and by nodes, over the planners."""
    ranks, top_k = len(ids_R), ids_R[0].shape[1]
    counts_RE = np.stack([np.bincount(ids_SK.ravel(), minlength=experts) for ids_SK in ids_R])
    nodes = Nodes.of(np.repeat(np.arange(node_count), ranks // node_count).tolist())
    links, cells, busiest = Links({}, nodes), [], []
    for planner in PLANNERS:
        plan = planner.plan(counts_RE, Homes.contiguous(experts, ranks))
        flow = Flow(plan, nodes, top_k)
        for found, place_R in ((flow.tokens_RR, np.arange(ranks)), (flow.tokens_RN, nodes.node_R)):
            truth = np.stack([_hits(plan, rank, ids_SK, place_R) for rank, ids_SK in enumerate(ids_R)])
            large = truth >= np.maximum(0.1 * flow.tokens_R[:, None], 1)
            cells.append(np.abs(found[large] / truth[large] - 1))
            if found.shape[1] == ranks:
                pairs = zip(links.busiest(found), links.busiest(truth.astype(float)), strict=True)
                busiest.append([abs(a / b - 1) for a, b in pairs if b > 0])
    return np.concatenate(cells), np.concatenate(busiest)


def _collect(cases):
    cells, busiest = zip(*(_errors(*case) for case in cases), strict=True)
    return np.concatenate(cells), np.concatenate(busiest)


def _workload_cases(ranks, experts, top_k, node_count):
    for code in WORKLOADS:
        sizes = {"ranks": ranks, "experts": experts, "tokens": 512, "top_k": top_k, "step": 3}
        low, high = reachable_max_mean(code, **sizes)
        for max_mean in (1.5, 2.5):
            ids_R = routing_ids(code, **sizes, max_mean=float(np.clip(max_mean, low, high)))
            yield ids_R, experts, node_count


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_of_the_stress_workloads(size):
    cells, busiest = _collect(_workload_cases(*size))
    assert np.median(cells) <= 0.03
    assert np.quantile(cells, 0.95) <= 0.09
    assert cells.max() <= 0.13
    assert np.median(busiest) <= 0.03
    assert busiest.max() <= 0.10


@pytest.mark.parametrize(("ranks", "node_count"), [(2, 2), (4, 2), (4, 4)])
def test_tokens_of_natural_routing(ranks, node_count):
    """Its tokens prefer experts together, which counts cannot tell: single cells are off by up to a third."""
    records = range(len(NATURAL.counts_NRE))
    cases = [
        (np.array_split(np.concatenate(NATURAL.ids_of(record)), ranks), 16, node_count) for record in records
    ]
    cells, busiest = _collect(cases)
    assert np.median(cells) <= 0.035
    assert cells.max() <= 0.33
    assert np.median(busiest) <= 0.03
    assert busiest.max() <= 0.20


def test_equally_popular_experts_are_the_hypergeometric_distribution():
    """Of 8 experts 4 a token, two on each of 4 ranks: a rank is missed with C(6, 4) / C(8, 4) = 15 / 70."""
    counts_RE = np.full((4, 8), 35)
    flow = Flow(StaticPlanner().plan(counts_RE, Homes.contiguous(8, 4)), Nodes.single(4), 4)
    np.testing.assert_allclose(flow.tokens_RR, 70 * (1 - 15 / 70))


def test_a_hot_expert_sends_every_token():
    counts_RE = np.array([[50, 10, 20, 20]] * 2)
    flow = Flow(StaticPlanner().plan(counts_RE, Homes.contiguous(4, 2)), Nodes.single(2), 2)
    np.testing.assert_allclose(flow.tokens_RR[:, 0], 50)


def test_an_unknown_pattern_is_refused():
    plan = StaticPlanner().plan(np.ones((3, 3), dtype=np.int64), Homes.contiguous(3, 3))
    with pytest.raises(ConfigError, match="transport"):
        Flow(plan, Nodes.single(3), 1).hops("pigeons")
    with pytest.raises(ConfigError, match="as many"):
        Flow(plan, Nodes.of("aab"), 1).hops("two_level")
