"""Periodic replication (EPLB), a reference to compare with.

DeepSeek's Expert Parallelism Load Balancer (github.com/deepseek-ai/EPLB), written from its description:
the greedy of one node, inside which our guests stay. Homes do not move here, so that redundant copies
alone carry the balance.

Shape suffixes: R ranks of the expert-parallel group, E experts.
"""

from collections import deque
from heapq import heapify, heappop, heappush
from math import lcm

import numpy as np

from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.checks import require_count
from anabranch.placement.guests import Guests, identity, most_foreign, plan_with
from anabranch.placement.load import cap_rows, load_of


class PeriodicReplicationPlanner:
    """Replicas chosen every `period` micro-batches from the loads of the last `window` ones.

    slots: redundant copies a rank hosts, all of them in use between two choices.
    period, window: in micro-batches.

    Rows of an expert are split evenly over its home and its replicas. The plan follows the past, so the
    fullest rank may exceed the cap, which is the mean; where it would exceed the identity's fullest rank,
    and before the first choice, the plan is the identity. One instance a layer: it remembers. New homes
    make it forget. Raises ConfigError naming the setting that is out of range.
    """

    name = "periodic_replication"

    def __init__(self, slots: int = 2, period: int = 32, window: int = 32) -> None:
        require_count("slots", slots, 1)
        require_count("period", period, 1)
        require_count("window", window, 1)
        self.slots, self.period = slots, period
        self._past: deque[IntArray] = deque(maxlen=window)
        self._homes: Homes | None = None
        self._seen = 0
        self._hosts: dict[int, list[int]] = {}

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), rows rank r routes to expert e, non-negative."""
        if self._homes is None or not _same(self._homes, homes):
            self._past.clear()
            self._homes, self._seen, self._hosts = homes, 0, {}
        load = load_of(counts_RE, homes)
        cap = cap_rows(load.total_rows, homes.ranks)
        plan = plan_with(split(load.expert_rows_E, self._hosts), counts_RE, homes, load, cap)
        self._past.append(load.expert_rows_E)
        self._seen += 1
        if self._seen % self.period == 0:
            self._hosts = replicate(np.sum(self._past, axis=0), homes, self.slots)
        if int(plan.rows_R.max()) > int(load.rank_rows_R.max()):
            return identity(counts_RE, homes, load, cap)
        return plan

    def slots_needed(self, homes: Homes) -> int:
        """`slots`, or fewer where no rank has that many experts left to host."""
        return min(self.slots, most_foreign(homes))


def replicate(past_E: IntArray, homes: Homes, slots: int) -> dict[int, list[int]]:
    """Ranks that host a replica of each replicated expert, for loads like `past_E`.

    Two greedy steps: R * slots times, one more replica of the expert with the most rows per copy; then,
    the heaviest replica first, each onto the least loaded rank with a free slot and no copy of it yet.
    A replica that finds no such rank is left out.
    """
    copies = _copies(past_E, homes, slots)
    past_rows, homes_of = past_E.tolist(), homes.rank_E.tolist()
    # Shares in whole numbers of a common unit: the sum over a rank is exact, in any order.
    unit = lcm(*copies)
    shares = [rows * (unit // n) for rows, n in zip(past_rows, copies, strict=True)]
    rank_shares, home_rows = [0] * homes.ranks, [0] * homes.ranks
    for expert, home in enumerate(homes_of):
        rank_shares[home] += shares[expert]
        home_rows[home] += past_rows[expert]
    free = [slots] * homes.ranks
    hosts: dict[int, list[int]] = {}
    for expert in sorted(range(homes.experts), key=lambda e: (shares[e], past_rows[e]), reverse=True):
        for _ in range(copies[expert] - 1):
            taken = {homes_of[expert], *hosts.get(expert, ())}
            open_ranks = [rank for rank in range(homes.ranks) if free[rank] and rank not in taken]
            if not open_ranks:
                break
            # Ranks that hold copies of the same experts weigh the same: their own experts break the tie.
            to = min(open_ranks, key=lambda rank: (rank_shares[rank], home_rows[rank]))
            hosts.setdefault(expert, []).append(to)
            free[to] -= 1
            rank_shares[to] += shares[expert]
    return hosts


def _copies(past_E: IntArray, homes: Homes, slots: int) -> list[int]:
    """Copies of each expert, its home included, at most one a rank."""
    copies = [1] * homes.experts
    # (-rows per copy, -rows, expert): pops the expert with the most rows per copy first.
    heap = [(-float(rows), -rows, expert) for expert, rows in enumerate(past_E.tolist()) if rows]
    heapify(heap)
    spare = homes.ranks * slots
    while spare and heap:
        _, rows, expert = heappop(heap)
        if copies[expert] < homes.ranks:
            copies[expert] += 1
            spare -= 1
            heappush(heap, (rows / copies[expert], rows, expert))
    return copies


def split(expert_rows_E: IntArray, hosts: dict[int, list[int]]) -> Guests:
    """Each replicated expert's rows in equal parts over its home and its hosts, the odd rows to the first."""
    guests = Guests()
    for expert, ranks in hosts.items():
        part, odd = divmod(int(expert_rows_E[expert]), len(ranks) + 1)
        for i, rank in enumerate(ranks, start=1):
            if rows := part + (i < odd):
                guests.add(expert, rank, rows)
    return guests


def _same(old: Homes, new: Homes) -> bool:
    return old is new or (old.ranks == new.ranks and np.array_equal(old.rank_E, new.rank_E))
