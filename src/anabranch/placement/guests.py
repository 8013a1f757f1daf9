"""Guest copies: the rows an expert hands from its home to other ranks, and the plan they make.

Shape suffixes: R ranks of the expert-parallel group, E experts, B most guests on any rank.
"""

from dataclasses import dataclass, field

import numpy as np

from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.load import Load


@dataclass(slots=True)
class Guests:
    """A growing list of guests in three columns: `experts[i]` computes `rows[i]` rows on `ranks[i]`.

    Plain lists: a planner adds a few dozen of them, and a numpy call costs more than ten list appends.
    No (expert, rank) pair appears twice, and no rank is the home of its guest.
    """

    experts: list[int] = field(default_factory=list[int])
    ranks: list[int] = field(default_factory=list[int])
    rows: list[int] = field(default_factory=list[int])

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, expert: int, rank: int, rows: int) -> None:
        """Records that `rank` computes `rows` rows of `expert`."""
        self.experts.append(expert)
        self.ranks.append(rank)
        self.rows.append(rows)

    def most_on_a_rank(self) -> int:
        """Guest slots the fullest rank needs."""
        return max(map(self.ranks.count, set(self.ranks)), default=0)


def plan_with(guests: Guests, counts_RE: IntArray, homes: Homes, load: Load, cap: int) -> Plan:
    """The plan in which each guest takes its rows from its expert's home, and all else stays at home."""
    quota_RE = np.zeros((homes.ranks, homes.experts), dtype=np.int64)
    quota_RE[homes.rank_E, np.arange(homes.experts)] = load.expert_rows_E
    if guests.rows:
        experts, rows = np.array(guests.experts), np.array(guests.rows)
        quota_RE[guests.ranks, experts] = rows
        # `at`: an expert with several guests appears several times.
        np.subtract.at(quota_RE, (homes.rank_E[experts], experts), rows)
    return Plan(counts_RE, quota_RE, homes, cap)


def identity(counts_RE: IntArray, homes: Homes, load: Load, cap: int) -> Plan:
    """The plan without guests: every expert computes all its rows at home."""
    return plan_with(Guests(), counts_RE, homes, load, cap)


def most_foreign(homes: Homes) -> int:
    """The most experts that any one rank does not own: an upper bound of its guests."""
    return homes.experts - int(np.bincount(homes.rank_E, minlength=homes.ranks).min())


def guest_experts(plan: Plan) -> IntArray:
    """int64 (R, B): the experts each rank hosts as guests, in ascending id, then -1 for empty slots.

    B is the most guests on any rank, 0 if nobody hosts one.
    """
    rank_G, expert_G = np.nonzero(plan.guest_RE)
    guests_R = np.bincount(rank_G, minlength=plan.homes.ranks)
    slot_G = np.arange(rank_G.shape[0]) - (np.cumsum(guests_R) - guests_R)[rank_G]
    experts_RB = np.full((plan.homes.ranks, int(guests_R.max())), -1, dtype=np.int64)
    experts_RB[rank_G, slot_G] = expert_G
    return experts_RB
