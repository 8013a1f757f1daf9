"""What planners within nodes promise, on any counts, homes and nodes. R ranks, E experts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.placement.base import Homes
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.least_loaded import LeastLoadedPlanner
from anabranch.placement.nodes import Nodes
from anabranch.placement.within_node import WithinNode

BUILDERS = {
    "exact": ExactPlanner,
    "bounded": BoundedPlanner,
    "bounded tight": lambda: BoundedPlanner(epsilon=0.0, slots=1, min_rows=3),
    "least_loaded": lambda: LeastLoadedPlanner(alpha=1.0, min_chunk_rows=1, threshold=1.0),
}


@st.composite
def cases(draw):
    """Any counts; homes on equal slots in any order; ranks of a node anywhere, nodes of any sizes."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    flat, order = Homes.contiguous(experts, ranks), draw(st.permutations(range(experts)))
    rank_E, slot_E = np.empty_like(flat.rank_E), np.empty_like(flat.slot_E)
    rank_E[order], slot_E[order] = flat.rank_E, flat.slot_E
    nodes = Nodes.of(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    some_rows = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**6))
    counts = draw(st.lists(some_rows, min_size=ranks * experts, max_size=ranks * experts))
    return np.array(counts, dtype=np.int64).reshape(ranks, experts), Homes(rank_E, slot_E, ranks), nodes


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
@settings(max_examples=200)
@given(case=cases())
def test_keeps_every_row_in_its_node_and_within_the_slots(build, case):
    counts_RE, homes, nodes = case
    before_RE, planner = counts_RE.copy(), WithinNode(build(), nodes)
    plan = planner.plan(counts_RE, homes)
    assert plan.quota_RE.dtype == np.int64
    assert plan.quota_RE.min() >= 0
    np.testing.assert_array_equal(plan.quota_RE.sum(axis=0), counts_RE.sum(axis=0))
    host_I, expert_I = np.nonzero(plan.guest_RE)
    np.testing.assert_array_equal(nodes.node_R[host_I], nodes.node_R[homes.rank_E[expert_I]])
    for node in range(nodes.count):
        own_R = nodes.node_R == node
        assert plan.rows_R[own_R].max() <= plan.home_rows_R[own_R].max(), "worse than static"
    assert plan.guest_RE.sum(axis=1).max() <= planner.slots_needed(homes)
    np.testing.assert_array_equal(counts_RE, before_RE, "the planner changed its input")
    np.testing.assert_array_equal(plan.quota_RE, WithinNode(build(), nodes).plan(counts_RE, homes).quota_RE)


@given(case=cases())
def test_exact_leaves_the_ranks_of_a_node_even(case):
    counts_RE, homes, nodes = case
    plan = WithinNode(ExactPlanner(), nodes).plan(counts_RE, homes)
    assert plan.fits
    for node in range(nodes.count):
        own_R = nodes.node_R == node
        assert plan.rows_R[own_R].max() <= -(-plan.rows_R[own_R].sum() // own_R.sum())
