"""What the cluster benchmark routes: W0-W7 and a recorded natural trace, per layer and micro-batch.

Shape suffixes: R ranks, E experts, S tokens of a rank, K experts a token, L layers.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anabranch.placement.base import Homes, IntArray, max_over_mean
from anabranch.workload.routing import WORKLOADS, reachable_max_mean, routing_ids
from anabranch.workload.trace import load_trace

NATURAL = "natural"
# Its source ranks differ in tokens, and a rank has the same tokens in every layer.
RAGGED = "W4"
# One micro-batch tells little of the next.
CHANGING = ("W6", "W7", NATURAL)
# So many of them do: they hold a burst, and calm ones before it.
CHANGES = 6
# Micro-batches before the first measured one: a policy that looks back has a past to look at. The second measured one
# is a burst of W7, so that two rounds tell policies apart.
PAST = 34


def workload_names() -> list[str]:
    """All workloads."""
    return [*WORKLOADS, NATURAL]


@dataclass(frozen=True)
class ClusterCases:
    """Sizes of what is routed. max_mean: wanted of the stress workloads, as near as each can come.

    trace: path of a recorded trace with token ids.
    """

    ranks: int
    experts: int
    top_k: int
    tokens: int
    layers: int
    max_mean: float
    trace: str

    def ids(self, workload: str, step: int) -> list[list[IntArray]]:
        """Top-k ids of one micro-batch: for each layer, one int64 (S, K) a rank. Each layer has hot experts of its
        own, but in W4; `step` is the micro-batch, so that rotating loads rotate and bursts come and go."""
        if workload == NATURAL:
            return self._natural(step)
        sizes = {"ranks": self.ranks, "experts": self.experts, "tokens": self.tokens, "top_k": self.top_k}
        made = []
        for layer in range(self.layers):
            seed = 1 if workload == RAGGED else layer + 1
            low, high = reachable_max_mean(workload, **sizes, step=step, seed=seed)
            wanted = min(max(self.max_mean, low), high)
            made.append(routing_ids(workload, **sizes, max_mean=wanted, step=step, seed=seed))
        return made

    def counts(self, ids: list[list[IntArray]]) -> list[IntArray]:
        """int64 (R, E) for each layer of the micro-batch whose `ids` these are."""
        return [
            np.stack([np.bincount(ids_SK.ravel(), minlength=self.experts) for ids_SK in by_rank])
            for by_rank in ids
        ]

    def max_mean_of(self, counts: list[IntArray]) -> float:
        """Rank max/mean with every expert at home, mean over the layers."""
        homes = Homes.contiguous(self.experts, self.ranks)
        loads = [np.bincount(homes.rank_E, counts_RE.sum(axis=0), self.ranks) for counts_RE in counts]
        return float(np.mean([max_over_mean(load_R) for load_R in loads]))

    def _natural(self, step: int) -> list[list[IntArray]]:
        """The trace's steps one after the other, each layer its own; tokens repeated or cut to the size wanted."""
        trace = load_trace(Path(self.trace))
        steps = sorted(set(trace.step_N.tolist()))
        wanted, layers = steps[step % len(steps)], sorted(set(trace.layer_N.tolist()))
        made = []
        for layer in range(self.layers):
            here_N = (trace.step_N == wanted) & (trace.layer_N == layers[layer % len(layers)])
            tokens_TK = np.concatenate(trace.ids_of(int(np.flatnonzero(here_N)[0]))).astype(np.int64)
            # A later round of the same step reads on where the last one stopped.
            shifted = np.roll(tokens_TK, -(step // len(steps)) * self.ranks * self.tokens, axis=0)
            made.append(np.split(np.resize(shifted, (self.ranks * self.tokens, self.top_k)), self.ranks))
        return made
