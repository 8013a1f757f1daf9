"""Bounded balance: shed only what exceeds the cap, with as few guest copies as possible.

Shape suffixes: R ranks of the expert-parallel group, E experts.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.checks import require_count, require_number
from anabranch.placement.exact import alias
from anabranch.placement.guests import Guests, identity, most_foreign, plan_with
from anabranch.placement.load import Load, cap_rows, hottest_first, load_of

# Passes over the copies when rows are levelled. Each lowers the sum of squared rank loads; after three
# the fullest rank was within 0.4 % of where fifty passes leave it (2 to 64 ranks, max/mean 1.1 to 3).
LEVEL_PASSES = 3


@dataclass(frozen=True)
class BoundedPlanner:
    """Loads every rank with at most ceil((1 + epsilon) * total / R) rows where the slots allow it.

    epsilon: tolerated load above the mean; 0.05 lets the fullest rank compute 5 % more than the mean.
    slots: the most guests a rank hosts, a hard limit.
    min_rows: the fewest rows a guest computes; below them its weights cost more than its rows.

    When the fullest rank is within the cap already the plan is the identity, for one comparison. When
    the cap cannot be met within `slots` and `min_rows`, the best plan found comes back with `fits` False.
    With `min_rows` 0 and `slots` of at least L (home slots a rank) it is always met.
    Raises ConfigError naming the setting that is out of range.
    """

    name = "bounded"

    epsilon: float = 0.05
    slots: int = 2
    min_rows: int = 0

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, 0.0)
        require_count("slots", self.slots, 1)
        require_count("min_rows", self.min_rows, 0)

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), rows rank r routes to expert e, non-negative."""
        load = load_of(counts_RE, homes)
        cap = cap_rows(load.total_rows, homes.ranks, self.epsilon)
        if int(load.rank_rows_R.max()) <= cap:
            return identity(counts_RE, homes, load, cap)
        least = max(1, self.min_rows)
        guests = level(shed(load, homes, cap, self.slots, least), load, homes, least)
        plan = plan_with(guests, counts_RE, homes, load, cap)
        if plan.fits:
            return plan
        # Emptiest-first can fill the slots of a rank from several donors; the alias construction takes
        # one donor a rank and always meets the cap, though not always these limits.
        guests = alias(load, homes, cap)
        if guests.most_on_a_rank() > self.slots or min(guests.rows) < least:
            return plan
        return plan_with(level(guests, load, homes, least), counts_RE, homes, load, cap)

    def slots_needed(self, homes: Homes) -> int:
        """`slots`, or fewer where no rank has that many experts left to host."""
        return min(self.slots, most_foreign(homes))


def shed(load: Load, homes: Homes, cap: int, slots: int, least: int) -> Guests:
    """Moves rows off ranks above `cap` until none is left, or until no move of `least` rows is.

    Repeats: the fullest rank hands rows of its hottest expert to the emptiest rank with a free slot. No
    other pair could move more rows in one copy. The copy's weights are paid for by then, so it takes as
    many rows as `_evening` allows rather than only the excess. No rank below the cap ever exceeds it, so
    a rank that gives has never received, and no (expert, rank) pair comes up twice.
    """
    home_rows, mean = load.rank_rows_R.tolist(), cap_rows(load.total_rows, homes.ranks)
    rows, hot = list(home_rows), hottest_first(load, homes, cap)
    fullest = [(-rows[rank], -home_rows[rank], rank) for rank in hot]
    below = np.flatnonzero(load.rank_rows_R < cap).tolist()
    emptiest = [(rows[rank], home_rows[rank], rank) for rank in below]
    heapify(fullest)
    heapify(emptiest)
    free = [slots] * homes.ranks
    guests = Guests()
    while fullest and emptiest:
        source, to = fullest[0][2], heappop(emptiest)[2]
        left, before, expert = hot[source][0]
        moved = min(-left, cap - rows[to], max(least, _evening(rows[source], rows[to], mean, cap)))
        if moved < least:
            break
        guests.add(expert, to, moved)
        heapreplace(hot[source], (left + moved, before, expert))
        rows[source] -= moved
        rows[to] += moved
        free[to] -= 1
        if free[to] and rows[to] < cap:
            heappush(emptiest, (rows[to], home_rows[to], to))
        if rows[source] > cap:
            heapreplace(fullest, (-rows[source], -home_rows[source], source))
        else:
            heappop(fullest)
            if rows[source] < cap:
                heappush(emptiest, (rows[source], home_rows[source], source))
    return guests


def _evening(source_rows: int, to_rows: int, mean: int, cap: int) -> int:
    """Rows that bring one of two ranks to the mean, or to the cap where only that ends the excess.

    The source is brought to the mean if the receiver stays below it. Otherwise the receiver takes what
    fills it to the mean, and above it, up to the cap, only what the source has in excess of the cap.
    """
    return min(source_rows - mean, max(mean - to_rows, min(source_rows - cap, cap - to_rows)))


def level(guests: Guests, load: Load, homes: Homes, least: int) -> Guests:
    """Evens out the ranks by shifting rows between homes and their guests; copies stay as they are.

    In place; returns `guests`. Each shift brings a home and a guest to the same load as far as the
    expert's rows go, leaving the guest at least `least` of them. The fullest rank never gets fuller.
    """
    rows, home_E = load.rank_rows_R.tolist(), homes.rank_E.tolist()
    kept = {expert: int(load.expert_rows_E[expert]) for expert in guests.experts}
    for expert, to, moved in zip(guests.experts, guests.ranks, guests.rows, strict=True):
        kept[expert] -= moved
        rows[home_E[expert]] -= moved
        rows[to] += moved
    pairs = [(i, guests.experts[i], home_E[guests.experts[i]], guests.ranks[i]) for i in range(len(guests))]
    for _ in range(LEVEL_PASSES):
        before = list(guests.rows)
        for i, expert, home, to in pairs:
            gap = (rows[home] - rows[to]) // 2
            shift = min(gap, kept[expert]) if gap > 0 else max(gap, least - guests.rows[i])
            guests.rows[i] += shift
            kept[expert] -= shift
            rows[home] -= shift
            rows[to] += shift
        if guests.rows == before:
            break
    return guests
