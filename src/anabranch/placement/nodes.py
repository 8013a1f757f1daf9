"""Which ranks share a node: the fast domain inside which links are cheap.

Shape suffixes: R ranks of the expert-parallel group, G nodes, M ranks a node.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anabranch.placement.base import IntArray


@dataclass(frozen=True, eq=False)
class Nodes:
    """node_R: the node of each rank, numbered 0..G-1 in the order of their first ranks."""

    node_R: IntArray

    @classmethod
    def of(cls, names: Sequence[Hashable]) -> "Nodes":
        """From one name a rank: equal names are one node."""
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(np.array([order[name] for name in names], dtype=np.int64))

    @classmethod
    def single(cls, ranks: int) -> "Nodes":
        """All ranks on one node."""
        return cls(np.zeros(ranks, dtype=np.int64))

    @property
    def ranks(self) -> int:
        """R."""
        return int(self.node_R.shape[0])

    @property
    def count(self) -> int:
        """G."""
        return int(self.node_R.max()) + 1

    @property
    def regular(self) -> bool:
        """Whether every node has the same number of ranks."""
        return bool((np.bincount(self.node_R) * self.count == self.ranks).all())

    @property
    def per_node(self) -> int:
        """M, where `regular`."""
        return self.ranks // self.count

    @cached_property
    def local_R(self) -> IntArray:
        """Place of each rank within its node, in rank order."""
        before_RR = np.tril(self.node_R[:, None] == self.node_R[None, :], -1)
        return before_RR.sum(axis=1)

    @cached_property
    def rank_GM(self) -> IntArray:
        """The rank at each place of each node, where `regular`."""
        return np.argsort(self.node_R, kind="stable").reshape(self.count, self.per_node)
