"""Exact balance by the alias construction: every rank computes at most ceil(total / R) rows.

M. D. Vose, "A linear algorithm for generating random numbers with a given distribution" (1991), after
A. J. Walker (1977): the table which samples any distribution in O(1) fills each column that is too
short from one column that is too tall. Columns are ranks here, probabilities are rows.
"""

from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.guests import Guests, identity, plan_with
from anabranch.placement.load import HotHeap, Load, cap_rows, hottest_first, load_of


class ExactPlanner:
    """Loads every rank with at most ceil(total / R) rows, always.

    O(R) trips. At most L (home slots a rank) guests on any rank, because all guests of a rank come from
    one donor and are the donor's own experts.
    """

    name = "exact"

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), rows rank r routes to expert e, non-negative."""
        load = load_of(counts_RE, homes)
        cap = cap_rows(load.total_rows, homes.ranks)
        if int(load.rank_rows_R.max()) <= cap:
            return identity(counts_RE, homes, load, cap)
        return plan_with(alias(load, homes, cap), counts_RE, homes, load, cap)

    def slots_needed(self, homes: Homes) -> int:
        """L, the home slots a rank; none on a single rank."""
        return homes.slots if homes.ranks > 1 else 0


def alias(load: Load, homes: Homes, cap: int) -> Guests:
    """Brings every rank to at most `cap` rows (cap * R >= total) with at most L guests a rank.

    Repeats: the emptiest rank below the cap is filled from the fullest rank above it, and is done. The
    donor may fall below the cap by this; it then waits to be filled itself. A filled rank never gives
    and a donor has never received, so that every rank has one donor, and its guests are that donor's
    own experts. Each trip finishes a rank: at most R - 1 trips.

    Room above `total` is slack. It is spent on ending a trip where the donor meets the cap, which spares
    the trip that would refill the donor.
    """
    home_rows = load.rank_rows_R.tolist()
    rows = list(home_rows)
    slack = cap * homes.ranks - load.total_rows
    assert slack >= 0, "the cap is below the mean"
    hot = hottest_first(load, homes, cap)
    surplus = [(-rows[rank], -home_rows[rank], rank) for rank in hot]
    below = np.flatnonzero(load.rank_rows_R < cap).tolist()
    deficit = [(rows[rank], home_rows[rank], rank) for rank in below]
    heapify(surplus)
    heapify(deficit)
    guests = Guests()
    while surplus:
        donor, filled = surplus[0][2], heappop(deficit)[2]
        room, over = cap - rows[filled], rows[donor] - cap
        moved = min(room, max(over, room - slack))
        slack -= room - moved
        _hand_over(hot[donor], filled, moved, guests)
        rows[donor] -= moved
        if rows[donor] > cap:
            heapreplace(surplus, (-rows[donor], -home_rows[donor], donor))
        else:
            heappop(surplus)
            if rows[donor] < cap:
                heappush(deficit, (rows[donor], home_rows[donor], donor))
    return guests


def _hand_over(hot: HotHeap, rank: int, rows: int, guests: Guests) -> None:
    """Moves `rows` rows of a donor's experts to `rank`, hottest expert first, so that copies are few."""
    while rows:
        left, before, expert = hot[0]
        moved = min(-left, rows)
        guests.add(expert, rank, moved)
        rows -= moved
        heapreplace(hot, (left + moved, before, expert))
