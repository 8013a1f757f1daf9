"""One row per (token, destination node) over the slow links, fan-out inside the node, partial sums on the way back.

Each rank has a rail: the ranks at its place of every node. A token first travels along its rank's rail to every
node that computes some of its experts, then from there to the ranks of that node that do. Outputs are summed at
each rank, again where the rail arrived, and at last at home.
"""

from typing import ClassVar

import numpy as np
import torch

from anabranch.errors import ConfigError
from anabranch.transport.dedup import Dedup, Stage


class TwoLevel(Dedup):
    """`dedup` in two stages. With all ranks on one node, or one rank on each, it is `dedup`.

    Codecs apply between nodes only: inside a node rows travel as they are. Raises ConfigError where nodes hold
    different numbers of ranks.
    """

    name: ClassVar[str] = "two_level"

    def _stages(self) -> tuple[Stage, ...]:
        domain, nodes = self.domain, self.domain.nodes
        if not nodes.regular:
            raise ConfigError(
                f"nodes hold {np.bincount(nodes.node_R).tolist()} ranks of the group; two_level needs as many "
                "on each. Use transport='dedup', or an ep_size that divides evenly",
                setting="transport",
            )
        if domain.rail is None or domain.local is None:
            return super()._stages()
        far_G = (np.arange(nodes.count) != nodes.node_R[self.rank]).astype(np.int64)
        between = Stage(domain.rail, torch.from_numpy(nodes.node_R), far_G, wired=True)
        near_M = np.zeros(nodes.per_node, dtype=np.int64)
        within = Stage(domain.local, torch.from_numpy(nodes.local_R), near_M, wired=False)
        return between, within
