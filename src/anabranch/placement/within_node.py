"""Balance inside each node by itself, so that guests' weights never cross the slow links between nodes.

Shape suffixes: R ranks of the expert-parallel group, E experts, M ranks of one node, F experts at home on it.
"""

from copy import deepcopy

import numpy as np

from anabranch.placement.base import Homes, IntArray, Plan, Planner
from anabranch.placement.guests import most_foreign
from anabranch.placement.nodes import Nodes


class WithinNode:
    """Gives each node's experts and ranks to a planner of its own, as if the node were the whole group.

    planner: what balances a node; every node gets a copy, so that one that remembers remembers one node.
    Rows from other nodes count as coming from the rank at their source's place, where `two_level` delivers them.
    The plan's cap is what the fullest node allows. What a node has too much stays in it.
    """

    def __init__(self, planner: Planner, nodes: Nodes) -> None:
        self.name = f"{planner.name}_within_node"
        self.nodes = nodes
        self.inner = planner
        self._planners = [deepcopy(planner) for _ in range(nodes.count)]

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), rows rank r routes to expert e, non-negative."""
        quota_RE = np.zeros_like(counts_RE)
        cap = 0
        for node, planner in enumerate(self._planners):
            rank_M = np.flatnonzero(self.nodes.node_R == node)
            expert_F = np.flatnonzero(self.nodes.node_R[homes.rank_E] == node)
            if not expert_F.size:
                continue
            own = Homes(self.nodes.local_R[homes.rank_E[expert_F]], homes.slot_E[expert_F], rank_M.size)
            counts_MF = np.zeros((rank_M.size, expert_F.size), dtype=np.int64)
            np.add.at(counts_MF, self.nodes.local_R % rank_M.size, counts_RE[:, expert_F])
            plan = planner.plan(counts_MF, own)
            quota_RE[rank_M[:, None], expert_F] = plan.quota_RE
            cap = max(cap, plan.cap)
        return Plan(counts_RE, quota_RE, homes, cap)

    def slots_needed(self, homes: Homes) -> int:
        """What the wrapped planner needs, or fewer where no rank has that many experts left in its node."""
        foreign = 0
        for node in range(self.nodes.count):
            home_F = homes.rank_E[self.nodes.node_R[homes.rank_E] == node]
            ranks = int((self.nodes.node_R == node).sum())
            if home_F.size:
                own = Homes(self.nodes.local_R[home_F], np.zeros_like(home_F), ranks)
                foreign = max(foreign, most_foreign(own))
        return min(self.inner.slots_needed(homes), foreign)
