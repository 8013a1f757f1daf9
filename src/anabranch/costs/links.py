"""The time of one all-to-all of uneven sizes, from measured even ones.

Shape suffixes: R ranks, N nodes.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from anabranch.costs.curve import Curve
from anabranch.costs.traffic import FloatArray
from anabranch.placement.nodes import Nodes
from anabranch.telemetry.samples import INTER, INTRA


class Busiest(NamedTuple):
    """What the busiest node sends or receives, the larger, over its ranks: to peers within it, and outside."""

    intra: float
    inter: float


class Links:
    """The measured links of a group of ranks.

    The curves hold for all ranks of a node sending at once, as they do in an exchange: they share what the node has,
    its network card outwards and its memory or loopback within. So the size to look up is the node's, divided by
    its ranks; a rank's own share of it does not matter. A node sends and receives at once, so only the larger of
    the two counts; the exchange ends when the busiest node's does.
    Traffic within nodes and between them is under way at the same time: the slower of the two counts.
    """

    def __init__(self, link_ms: Mapping[str, Mapping[int, float]], nodes: Nodes) -> None:
        self._curves = {name: Curve(table) for name, table in link_ms.items()}
        self._nodes = nodes

    @cached_property
    def _at_RN(self) -> FloatArray:
        return (self._nodes.node_R[:, None] == np.arange(self._nodes.count)).astype(np.float64)

    def busiest(self, sent_RR: FloatArray) -> Busiest:
        """sent_RR: what rank s sends to rank d, in any unit; the diagonal travels nowhere."""
        at_RN = self._at_RN
        between_NN = at_RN.T @ sent_RR @ at_RN
        within_N = between_NN.diagonal() - at_RN.T @ sent_RR.diagonal()
        np.fill_diagonal(between_NN, 0.0)
        across_N = np.maximum(between_NN.sum(axis=0), between_NN.sum(axis=1))
        ranks_N = at_RN.sum(axis=0)
        return Busiest(float((within_N / ranks_N).max()), float((across_N / ranks_N).max()))

    def ms(self, busiest: Busiest, unit_bytes: float, classes: tuple[str, ...] = (INTRA, INTER)) -> float:
        """Time of one exchange of `busiest` units of `unit_bytes` in a group with peers of these classes.

        A class without ranks in it costs nothing, one without bytes its latency.
        """
        sizes = {INTRA: busiest.intra, INTER: busiest.inter}
        times = [self._curves[name].ms(sizes[name] * unit_bytes) for name in classes if name in self._curves]
        return max(map(float, times), default=0.0)
