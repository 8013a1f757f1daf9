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


@dataclass(frozen=True, eq=False)
class Domain:
    """One expert-parallel group, seen from one rank, with the groups that exchange patterns need within it.

    group: all ranks; back: the same ranks again. Dispatch uses one and combine the other, so that both
    directions of a link are busy when they overlap: gloo serves a pair of ranks half-duplex within a group.
    rail, rail_back: the ranks at this rank's place of every node. Both are None on a single node.
    local: the ranks of this rank's node; None where it is alone there.
    Rails and locals exist where all nodes have the same number of ranks; `group` alone does elsewhere.
    """

    group: dist.ProcessGroup
    back: dist.ProcessGroup
    nodes: Nodes
    rail: dist.ProcessGroup | None = None
    rail_back: dist.ProcessGroup | None = None
    local: dist.ProcessGroup | None = None

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
    if len(ranks) == 1:
        return Domain(group, group, nodes)
    back = _subgroup(ranks)
    if not nodes.regular:
        return Domain(group, back, nodes)
    rank = dist.get_rank(group)
    rail = rail_back = local = None
    if nodes.count > 1:
        members = [ranks[r] for r in nodes.rank_GM[:, nodes.local_R[rank]]]
        rail, rail_back = _subgroup(members), _subgroup(members)
    if nodes.per_node > 1:
        local = _subgroup([ranks[r] for r in nodes.rank_GM[nodes.node_R[rank]]])
    return Domain(group, back, nodes, rail, rail_back, local)


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
