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
    """What the busiest node moves, over its ranks: among them, and to and from other nodes."""

    intra: float
    inter: float


class Links:
    """The measured links of a group of ranks.

    The curves hold for all ranks of a node sending at once, as they do in an exchange: they share what the node has,
    its network card outwards and its memory or loopback within. So the size to look up is the node's, divided by
    its ranks; a rank's own share of it does not matter. The exchange ends when the busiest node's does.

    The curves also hold for as many bytes one way as the other, which skewed exchanges are far from: what a node
    sends beyond what it receives, or the reverse, travels at the rate of one direction alone. `duplex` is how long
    that takes in parts of the time of both: 1 where the directions do not disturb each other, 1/2 where they take
    turns (gloo on shaped links: 0.6 at 1 Gbit/s, 0.8 at 300 Mbit/s). From the largest one-way sample; 1 without any.

    A rank that sends alone, as the home of a hot expert does, may be slower than its node: its share of the CPU or its
    own link bounds it. `alone` is its time over that of as many bytes from each rank of the node at once: 1 where
    ranks do not share what bounds them. From the largest sample of each class; 0, no bound of its own, without one.

    Traffic within nodes and between them is under way at the same time: the slower of the two counts. (On emulated
    links both together took as long as the slower one, within 5 %, unless the faster one came to half of it.)
    """

    def __init__(
        self,
        link_ms: Mapping[str, Mapping[int, float]],
        nodes: Nodes,
        one_way_ms: Mapping[int, float] | None = None,
        alone_ms: Mapping[str, Mapping[int, float]] | None = None,
    ) -> None:
        self._curves = {name: Curve(table) for name, table in link_ms.items()}
        self._nodes = nodes
        self.duplex = self._fit_duplex(one_way_ms or {})
        known = {name: table for name, table in (alone_ms or {}).items() if name in self._curves}
        self.alone = {name: self._fit_alone(name, table) for name, table in known.items()}

    def _fit_duplex(self, one_way_ms: Mapping[int, float]) -> float:
        if not one_way_ms or INTER not in self._curves:
            return 1.0
        size, curve = max(one_way_ms), self._curves[INTER]
        latency_ms, both_ms = (float(curve.ms(bytes_)) for bytes_ in (0.0, float(size)))
        if both_ms <= latency_ms:
            return 1.0
        # Noise may leave the range of what links do.
        return float(np.clip((one_way_ms[size] - latency_ms) / (both_ms - latency_ms), 0.5, 1.0))

    def _fit_alone(self, name: str, alone_ms: Mapping[int, float]) -> float:
        size, curve = max(alone_ms), self._curves[name]
        latency_ms, all_ms = (float(curve.ms(bytes_)) for bytes_ in (0.0, float(size)))
        if all_ms <= latency_ms:
            return 0.0
        return float(np.clip((alone_ms[size] - latency_ms) / (all_ms - latency_ms), 0.0, 1.0))

    @cached_property
    def _at_RN(self) -> FloatArray:
        return (self._nodes.node_R[:, None] == np.arange(self._nodes.count)).astype(np.float64)

    def busiest(self, sent_RR: FloatArray) -> Busiest:
        """sent_RR: what rank s sends to rank d, in any unit; the diagonal travels nowhere."""
        at_RN = self._at_RN
        between_NN = at_RN.T @ sent_RR @ at_RN
        within_N = between_NN.diagonal() - at_RN.T @ sent_RR.diagonal()
        np.fill_diagonal(between_NN, 0.0)
        out_N, in_N = between_NN.sum(axis=1), between_NN.sum(axis=0)
        across_N = self.duplex * np.maximum(out_N, in_N) + (1.0 - self.duplex) * np.minimum(out_N, in_N)
        ranks_N = at_RN.sum(axis=0)
        near_RR = at_RN @ at_RN.T > 0
        near, far = (_most_alone(np.where(here_RR, sent_RR, 0.0)) for here_RR in (near_RR, ~near_RR))
        return Busiest(
            max(float((within_N / ranks_N).max()), self.alone.get(INTRA, 0.0) * near),
            max(float((across_N / ranks_N).max()), self.alone.get(INTER, 0.0) * far),
        )

    def ms(self, busiest: Busiest, unit_bytes: float, classes: tuple[str, ...] = (INTRA, INTER)) -> float:
        """Time of one exchange of `busiest` units of `unit_bytes` in a group with peers of these classes.

        A class without ranks in it costs nothing, one without bytes its latency.
        """
        sizes = {INTRA: busiest.intra, INTER: busiest.inter}
        times = [self._curves[name].ms(sizes[name] * unit_bytes) for name in classes if name in self._curves]
        return max(map(float, times), default=0.0)


def _most_alone(sent_RR: FloatArray) -> float:
    """What the busiest rank sends to others or receives from them, whichever is more."""
    own_R = sent_RR.diagonal()
    return float(np.maximum(sent_RR.sum(axis=1) - own_R, sent_RR.sum(axis=0) - own_R).max())
