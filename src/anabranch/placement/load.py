"""The load of one layer and micro-batch: what every planner looks at first.

Shape suffixes: R ranks of the expert-parallel group, E experts.
"""

import math
from typing import NamedTuple

import numpy as np

from anabranch.placement.base import Homes, IntArray

# Heaps hold (key, tie-break, id), the tie-break being the load before any row moved: while those loads
# differ, a plan does not depend on how ranks and experts are numbered, whatever loads meet on the way.
# (-rows, -rows before, expert): pops the expert with the most rows first.
HotHeap = list[tuple[int, int, int]]


class Load(NamedTuple):
    """Rows of each expert over all source ranks, and rows of each rank if every expert stays at home."""

    expert_rows_E: IntArray
    rank_rows_R: IntArray
    total_rows: int


def load_of(counts_RE: IntArray, homes: Homes) -> Load:
    """Sums `counts_RE` (int64 (R, E), rows rank r routes to expert e) by expert and by home rank."""
    expert_rows_E = counts_RE.sum(axis=0)
    # bincount sums in float64, which is exact up to 2^53 rows: beyond any micro-batch.
    rank_rows_R = np.bincount(homes.rank_E, weights=expert_rows_E, minlength=homes.ranks).astype(np.int64)
    return Load(expert_rows_E, rank_rows_R, int(rank_rows_R.sum()))


def cap_rows(total_rows: int, ranks: int, epsilon: float = 0.0) -> int:
    """ceil((1 + epsilon) * total / R): the most rows a rank may compute (DESIGN 2)."""
    mean_up = -(-total_rows // ranks)
    return max(mean_up, math.ceil((1.0 + epsilon) * total_rows / ranks)) if epsilon else mean_up


def hottest_first(load: Load, homes: Homes, over_rows: int) -> dict[int, HotHeap]:
    """For each rank with more than `over_rows` rows: a heap of its own experts, the hottest on top."""
    heaps: dict[int, HotHeap] = {rank: [] for rank in np.flatnonzero(load.rank_rows_R > over_rows).tolist()}
    wanted_E = np.flatnonzero((load.rank_rows_R > over_rows)[homes.rank_E])
    order = np.argsort(-load.expert_rows_E[wanted_E], kind="stable")
    hot_E = wanted_E[order]
    # Sorted lists are heaps already.
    for expert, rank, rows in zip(
        hot_E.tolist(), homes.rank_E[hot_E].tolist(), load.expert_rows_E[hot_E].tolist(), strict=True
    ):
        heaps[rank].append((-rows, -rows, expert))
    return heaps
