"""The ranks a layer's rows travel between, and which of them share a node.

Shape suffixes: R ranks, G nodes, M ranks a node.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed as dist

from anabranch.placement.nodes import Nodes
from anabranch.transport.collectives import gather_plain
from anabranch.transport.lanes import Lanes


@dataclass(frozen=True, eq=False)
class Domain:
    """One expert-parallel group, seen from one rank, with the groups that exchange patterns need within it.

    group: all ranks. lanes: the same, for exchanges: two groups where slow links would else be used half-duplex.
    rail: the ranks at this rank's place of every node; None on a single node.
    local: the ranks of this rank's node; None where it is alone there.
    Rails and locals exist where all nodes have the same number of ranks.
    """

    group: dist.ProcessGroup
    lanes: Lanes
    nodes: Nodes
    rail: Lanes | None = None
    local: Lanes | None = None

    @property
    def rank(self) -> int:
        """This rank's place in `group`."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes.ranks


def make_domain(group: dist.ProcessGroup, device: torch.device) -> Domain:
    """The domain of `group`, whose tensors live on `device`. Collective over `group`."""
    return _domain(group, tuple(nodes_of(group, device).node_R.tolist()))


@cache
def _domain(group: dist.ProcessGroup, node_R: tuple[int, ...]) -> Domain:
    # Once a group: a process group holds threads and sockets, and is never given back.
    ranks, nodes = dist.get_process_group_ranks(group), Nodes(np.array(node_R, dtype=np.int64))
    if nodes.count == 1:
        return Domain(group, Lanes(group, group), nodes)
    # Other backends do not mind directions, and some must not have collectives of two groups under way.
    halves = dist.get_backend(group) == "gloo"
    lanes = Lanes(group, _subgroup(ranks) if halves else group)
    if not nodes.regular:
        return Domain(group, lanes, nodes)
    rank = dist.get_rank(group)
    members = [ranks[r] for r in nodes.rank_GM[:, nodes.local_R[rank]]]
    up = _subgroup(members)
    rail = Lanes(up, _subgroup(members) if halves else up)
    local = None
    if nodes.per_node > 1:
        inside = _subgroup([ranks[r] for r in nodes.rank_GM[nodes.node_R[rank]]])
        local = Lanes(inside, inside)
    return Domain(group, lanes, nodes, rail, local)


def _subgroup(members: list[int]) -> dist.ProcessGroup:
    # Only the members call: expert-parallel groups beside this one need not take part.
    made = dist.new_group(members, use_local_synchronization=True, sort_ranks=False)
    assert isinstance(made, dist.ProcessGroup)
    return made


def nodes_of(group: dist.ProcessGroup, device: torch.device) -> Nodes:
    """Ranks with one host name and one torchrun agent (its GROUP_RANK) share a node. Collective.

    The agent counts because containers and emulated nodes may share a host name.
    """
    name = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    numbers_R = gather_plain(torch.tensor([number], dtype=torch.int64, device=device), group)
    return Nodes.of(numbers_R.tolist())
