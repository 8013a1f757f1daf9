import numpy as np

from anabranch.placement.base import Homes
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.nodes import Nodes
from anabranch.placement.periodic_replication import PeriodicReplicationPlanner
from anabranch.placement.within_node import WithinNode
from anabranch.workload.routing import routing_counts

PAIRS = Nodes.of(["a", "a", "b", "b"])


def _counts(expert_rows):
    counts_RE = np.zeros((4, len(expert_rows)), dtype=np.int64)
    counts_RE[3] = expert_rows
    return counts_RE


def test_each_node_is_balanced_by_itself():
    plan = WithinNode(ExactPlanner(), PAIRS).plan(
        _counts([80, 20, 0, 0, 4, 6, 10, 0]), Homes.contiguous(8, 4)
    )
    assert plan.rows_R.tolist() == [50, 50, 10, 10]
    assert np.argwhere(plan.guest_RE).tolist() == [[1, 0]]
    assert plan.cap == 50
    assert plan.fits


def test_alone_on_its_node_a_rank_has_no_guests():
    planner = WithinNode(ExactPlanner(), Nodes.of(range(4)))
    homes = Homes.contiguous(8, 4)
    assert planner.plan(_counts([90, 9, 0, 0, 0, 0, 0, 1]), homes).guests == 0
    assert planner.slots_needed(homes) == 0


def test_on_a_single_node_it_is_the_wrapped_planner():
    counts_RE = routing_counts("W3", ranks=4, experts=16, tokens=64, top_k=4, max_mean=1.8)
    homes = Homes.contiguous(16, 4)
    for planner in (ExactPlanner(), BoundedPlanner(0.02, 3)):
        within, plain = WithinNode(planner, Nodes.single(4)), planner.plan(counts_RE, homes)
        np.testing.assert_array_equal(within.plan(counts_RE, homes).quota_RE, plain.quota_RE)
        assert within.slots_needed(homes) == planner.slots_needed(homes)
        assert within.name == f"{planner.name}_within_node"


def test_a_planner_that_remembers_remembers_one_node():
    homes = Homes.contiguous(8, 4)
    counts_RE = _counts([80, 20, 0, 0, 4, 6, 10, 0])
    within = WithinNode(PeriodicReplicationPlanner(slots=1, period=1, window=1), PAIRS)
    alone = PeriodicReplicationPlanner(slots=1, period=1, window=1)
    for _ in range(3):
        plan = within.plan(counts_RE, homes)
        first_node = alone.plan(counts_RE[2:, :4], Homes.contiguous(4, 2))
    np.testing.assert_array_equal(plan.quota_RE[:2, :4], first_node.quota_RE)
    assert plan.guest_RE[:2].any()
