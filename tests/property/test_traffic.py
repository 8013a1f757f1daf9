"""What the traffic of a plan keeps, on any plan. R ranks, E experts, S tokens of a source, K experts a token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anabranch.costs.links import Links
from anabranch.costs.traffic import Flow, distinct
from anabranch.placement.assign import send_RE
from anabranch.placement.base import Homes, Plan
from anabranch.placement.nodes import Nodes
from anabranch.placement.static import StaticPlanner

TRANSPORTS = ("all_to_all", "dedup", "two_level")


@st.composite
def flows(draw):
    """Whole tokens of K distinct experts, split over the ranks as no planner would, on regular nodes."""
    node_count, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks, experts = node_count * per_node, draw(st.integers(1, 8))
    top_k = draw(st.integers(1, min(experts, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens_R = rng.integers(0, 30, ranks)
    counts_RE = np.zeros((ranks, experts), dtype=np.int64)
    for rank, tokens in enumerate(tokens_R):
        weight_E = rng.dirichlet(np.full(experts, 0.5)) + 1e-6
        for _ in range(tokens):
            counts_RE[rank, rng.choice(experts, top_k, replace=False, p=weight_E / weight_E.sum())] += 1
    homes = Homes(rng.integers(0, ranks, experts), np.zeros(experts, dtype=np.int64), ranks)
    quota_RE = np.zeros_like(counts_RE)
    for expert, total in enumerate(counts_RE.sum(axis=0)):
        home_only = np.arange(ranks) == homes.rank_E[expert]
        quota_RE[:, expert] = rng.multinomial(
            total, rng.dirichlet(np.ones(ranks)) if rng.random() < 0.5 else home_only
        )
    plan = Plan(counts_RE, quota_RE, homes, cap=int(quota_RE.sum(axis=1).max()))
    nodes = Nodes.of(rng.permutation(np.repeat(np.arange(node_count), per_node)).tolist())
    return Flow(plan, nodes, top_k)


@given(flow=flows())
def test_rows_are_those_that_transports_are_told_to_send(flow):
    sent_RR = np.stack([send_RE(flow.plan, rank).sum(axis=1) for rank in range(flow.nodes.ranks)])
    np.testing.assert_array_equal(flow.hops("all_to_all")[0].rows_RR, sent_RR)
    np.testing.assert_array_equal(sent_RR.sum(axis=0), flow.plan.rows_R)


@given(flow=flows())
def test_a_token_travels_at_least_once_and_at_most_once_per_row(flow):
    for tokens_RX in (flow.tokens_RR, flow.tokens_RN):
        assert (tokens_RX <= flow.tokens_R[:, None] + 1e-9).all()
        assert (tokens_RX.sum(axis=1) >= flow.tokens_R - 1e-9).all()
    assert (flow.tokens_RR <= flow.rows_RR + 1e-9).all()
    assert (flow.tokens_RR * flow.top_k >= flow.rows_RR - 1e-9).all()
    by_node_RN = flow.tokens_RR @ (flow.nodes.node_R[:, None] == np.arange(flow.nodes.count))
    # Of a node's ranks, each gets some of what the node gets; the bounds alone decide at the edges.
    assert (flow.tokens_RN <= by_node_RN + 1e-6).all()


@given(flow=flows())
def test_two_level_crosses_on_rails_and_fans_out_inside_nodes(flow):
    hops, nodes = flow.hops("two_level"), flow.nodes
    if len(hops) == 1:
        assert nodes.count == 1 or nodes.per_node == 1
        np.testing.assert_array_equal(hops[0].rows_RR, flow.hops("dedup")[0].rows_RR)
        return
    rail, fan = (hop.rows_RR for hop in hops)
    same_place = nodes.local_R[:, None] == nodes.local_R
    same_node = nodes.node_R[:, None] == nodes.node_R
    assert not rail[~same_place].any()
    assert not fan[~same_node].any()
    np.testing.assert_allclose(rail.sum(axis=1), flow.tokens_RN.sum(axis=1))
    np.testing.assert_allclose(fan.sum(axis=0), flow.tokens_RR.sum(axis=0))
    assert [hop.links for hop in hops] == [("inter",), ("intra",)]
    assert [hop.wired for hop in hops] == [True, False]


@given(flow=flows())
def test_every_guest_comes_from_its_home(flow):
    assert flow.copies_RR.sum() == flow.plan.guests
    np.testing.assert_array_equal(flow.copies_RR.sum(axis=0), flow.plan.guest_RE.sum(axis=1))
    assert not flow.copies_RR.diagonal().any()


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_distinct_tokens_stay_within_what_any_routing_allows(tokens, experts, top_k, seed):
    """The bounds hold for real tokens too, so clipping to them never leaves the truth outside."""
    top_k, rng = min(top_k, experts), np.random.default_rng(seed)
    ids_SK = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    there_E = rng.random(experts) < 0.5
    counts_E = np.bincount(ids_SK.ravel(), minlength=experts)
    rows, most = counts_E[there_E].sum(), counts_E[there_E].max(initial=0)
    truth = there_E[ids_SK].any(axis=1).sum()
    (found,) = distinct(np.array([[rows]]), np.array([[most]]), np.array([tokens]), top_k, experts)
    low, high = max(most, rows / top_k), min(rows, tokens)
    assert low <= truth <= high
    assert low - 1e-9 <= found[0] <= high + 1e-9
    if there_E.all():
        assert found[0] == truth == tokens


@given(flow=flows())
def test_zero_rows_make_zero_traffic(flow):
    nothing = np.zeros_like(flow.plan.counts_RE)
    still = Flow(Plan(nothing, nothing, flow.plan.homes, 0), flow.nodes, flow.top_k)
    for transport in TRANSPORTS:
        assert not any(hop.rows_RR.any() for hop in still.hops(transport))


@given(flow=flows(), seed=st.integers(0, 2**32 - 1))
def test_ranks_of_a_node_are_interchangeable_to_the_price(flow, seed):
    """With experts at home, renaming ranks changes no exchange's busiest node, if each stays in its node and, for
    the rails of `two_level`, ranks that share a place go on sharing one."""
    nodes, counts_RE, homes = flow.nodes, flow.plan.counts_RE, flow.plan.homes
    rng = np.random.default_rng(seed)
    order_GM = nodes.rank_GM[:, rng.permutation(nodes.per_node)]
    sigma_R = np.empty(nodes.ranks, dtype=np.int64)
    sigma_R[nodes.rank_GM.ravel()] = order_GM.ravel()
    renamed_RE = np.empty_like(counts_RE)
    renamed_RE[sigma_R] = counts_RE
    renamed = Homes(sigma_R[homes.rank_E], homes.slot_E, homes.ranks)
    before = Flow(StaticPlanner().plan(counts_RE, homes), nodes, flow.top_k)
    after = Flow(StaticPlanner().plan(renamed_RE, renamed), nodes, flow.top_k)
    links = Links({}, nodes)
    for transport in TRANSPORTS:
        for one, two in zip(before.hops(transport), after.hops(transport), strict=True):
            np.testing.assert_allclose(two.rows_RR[np.ix_(sigma_R, sigma_R)], one.rows_RR, atol=1e-9)
            np.testing.assert_allclose(links.busiest(two.rows_RR), links.busiest(one.rows_RR), atol=1e-9)
