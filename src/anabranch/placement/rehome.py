"""The slow loop: which rank owns which expert, chosen anew from past load.

A guest's weights travel in every micro-batch, a new home's once, with the optimizer's state: so across slow links
experts migrate. Shape suffixes: R ranks, L home slots a rank, E experts, P places (R * L).
"""

from typing import NamedTuple

import numpy as np

from anabranch.placement.base import Homes, IntArray

# A swap must take this share of the mean load off the fuller rank of the two: each moves two experts' state.
WORTH = 0.01


class Rehomed(NamedTuple):
    """moved: experts whose rank is another one than before."""

    homes: Homes
    moved: int


def rehome(past_E: IntArray, homes: Homes) -> Rehomed:
    """New homes for loads like `past_E`: rows of each expert, non-negative.

    Experts of the fullest rank are exchanged for those of others, one pair at a time, always the pair that leaves the
    fuller of its two ranks with the least; ends when no exchange saves WORTH of the mean load. An empty slot counts as
    an expert without rows, so every rank keeps at most L. The fullest rank never gets fuller. Deterministic.
    """
    place_E = homes.rank_E * homes.slots + homes.slot_E
    expert_P = np.full(homes.ranks * homes.slots, -1, dtype=np.int64)
    expert_P[place_E] = np.arange(homes.experts)
    rows_RL = np.where(expert_P < 0, 0, past_E[expert_P]).reshape(homes.ranks, homes.slots)
    expert_RL, least = expert_P.reshape(rows_RL.shape), WORTH * past_E.sum() / homes.ranks
    while True:
        load_R = rows_RL.sum(axis=1)
        full = int(load_R.argmax())
        # Rows that leave the fullest rank for rank d, by its own slot i and the other's slot j: (L, R, L).
        leave_LRL = rows_RL[full][:, None, None] - rows_RL[None]
        fuller_LRL = np.maximum(load_R[full] - leave_LRL, load_R[:, None] + leave_LRL)
        fuller_LRL[:, full] = load_R[full]
        mine, other, theirs = np.unravel_index(int(fuller_LRL.argmin()), fuller_LRL.shape)
        if load_R[full] - fuller_LRL[mine, other, theirs] <= least:
            break
        for table_RL in (rows_RL, expert_RL):
            table_RL[full, mine], table_RL[other, theirs] = table_RL[other, theirs], table_RL[full, mine]
    rank_P, slot_P = np.divmod(np.arange(expert_P.size), homes.slots)
    held_P, rank_E, slot_E = expert_RL.ravel() >= 0, homes.rank_E.copy(), homes.slot_E.copy()
    rank_E[expert_RL.ravel()[held_P]], slot_E[expert_RL.ravel()[held_P]] = rank_P[held_P], slot_P[held_P]
    return Rehomed(Homes(rank_E, slot_E, homes.ranks), int((rank_E != homes.rank_E).sum()))
