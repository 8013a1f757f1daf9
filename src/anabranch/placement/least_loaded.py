"""Least-loaded expert parallelism (LLEP), a reference to compare with.

X.-P. Nguyen et al., "Least-Loaded Expert Parallelism: Load Balancing An Imbalanced Mixture-of-Experts",
arXiv:2601.17111 (2026); written from its description, for whose settings the defaults stand.

Shape suffixes: R ranks of the expert-parallel group, E experts.
"""

from dataclasses import dataclass

import numpy as np

from anabranch.placement.base import Homes, IntArray, Plan, max_over_mean
from anabranch.placement.checks import require_count, require_number
from anabranch.placement.guests import Guests, identity, most_foreign, plan_with
from anabranch.placement.load import Load, cap_rows, load_of


@dataclass(frozen=True)
class LeastLoadedPlanner:
    """Longest processing time first: what does not fit a rank spills in chunks to the least loaded ranks.

    alpha: capacity of a rank in units of the mean load.
    min_chunk_rows: the fewest rows worth a spill (the paper's m).
    threshold: max/mean up to which the plan is the identity (the paper's lambda).

    It knows no limit on guests a rank. The cap is the capacity; the last chunk of an expert may exceed it.
    Raises ConfigError naming the setting that is out of range.
    """

    name = "least_loaded"

    alpha: float = 1.0
    min_chunk_rows: int = 1024
    threshold: float = 1.3

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, 1.0)
        require_count("min_chunk_rows", self.min_chunk_rows, 1)
        require_number("threshold", self.threshold, 1.0)

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), rows rank r routes to expert e, non-negative."""
        load = load_of(counts_RE, homes)
        capacity = cap_rows(load.total_rows, homes.ranks, self.alpha - 1.0)
        fullest_rows = int(load.rank_rows_R.max())
        if max_over_mean(load.rank_rows_R) <= self.threshold:
            return identity(counts_RE, homes, load, max(capacity, fullest_rows))
        return plan_with(spill(load, homes, capacity, self.min_chunk_rows), counts_RE, homes, load, capacity)

    def slots_needed(self, homes: Homes) -> int:
        """Every expert a rank does not own."""
        return most_foreign(homes)


def spill(load: Load, homes: Homes, capacity: int, min_chunk_rows: int) -> Guests:
    """Goes through the experts, hottest first, and spills what exceeds the capacity of their home.

    A rank's load counts the experts still to come at their homes. Chunks go to the least loaded rank
    with room for one of `min_chunk_rows`; if none has, the whole rest goes to the least loaded rank. That
    rank is at most at the mean and the rest at most the home's excess over the capacity, so it ends below
    where the home was: never worse than the identity. A rest of less than a chunk stays at home.
    """
    home_rows, guests = load.rank_rows_R.tolist(), Guests()
    rows = list(home_rows)
    for expert in np.argsort(-load.expert_rows_E, kind="stable").tolist():
        home = int(homes.rank_E[expert])
        rest = min(int(load.expert_rows_E[expert]), rows[home] - capacity)
        while rest >= min_chunk_rows:
            to = min(range(homes.ranks), key=lambda rank: (rows[rank], home_rows[rank]))
            room = capacity - rows[to]
            chunk = min(rest, room) if room >= min_chunk_rows else rest
            guests.add(expert, to, chunk)
            rows[home] -= chunk
            rows[to] += chunk
            rest -= chunk
    return guests
