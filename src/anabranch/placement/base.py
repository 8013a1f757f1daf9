"""The contract of a planner: routed counts in, a plan out.

Shape suffixes: R ranks of the expert-parallel group, E experts, L home slots a rank (ceil(E / R)).
A *row* is one (token, expert) pair. Everything here is deterministic: every rank computes the same
plan from the same counts, so no plan is ever exchanged.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import ConfigError

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Homes:
    """Which rank owns each expert, and in which of the rank's slots.

    Experts sit on equal slots per rank: when E is not a multiple of R the last slots of the last ranks
    stay empty, the way `torch.chunk` leaves them.
    """

    rank_E: IntArray
    slot_E: IntArray
    ranks: int

    @classmethod
    def contiguous(cls, experts: int, ranks: int) -> "Homes":
        """Expert e on rank e // L, slot e % L: the layout of `Shard(0)`."""
        if experts < 1 or ranks < 1:
            raise ConfigError(f"experts={experts} on ranks={ranks}: both must be at least 1", setting="ranks")
        slots = -(-experts // ranks)
        ids_E = np.arange(experts, dtype=np.int64)
        return cls(ids_E // slots, ids_E % slots, ranks)

    @property
    def experts(self) -> int:
        return int(self.rank_E.shape[0])

    @property
    def slots(self) -> int:
        """L: home slots a rank."""
        return -(-self.experts // self.ranks)


@dataclass(frozen=True, eq=False)
class Plan:
    """Who computes what in one layer and micro-batch.

    counts_RE: rows that rank r routes to expert e.
    quota_RE: rows of expert e computed on rank d; every column sums to the column of `counts_RE`.
    cap: the most rows any rank was meant to compute.
    """

    counts_RE: IntArray
    quota_RE: IntArray
    homes: Homes
    cap: int

    @cached_property
    def rows_R(self) -> IntArray:
        """Rows each rank computes under this plan."""
        return self.quota_RE.sum(axis=1)

    @cached_property
    def home_rows_R(self) -> IntArray:
        """Rows each rank would compute if every expert stayed at home."""
        return np.bincount(
            self.homes.rank_E, weights=self.counts_RE.sum(axis=0), minlength=self.homes.ranks
        ).astype(np.int64)

    @cached_property
    def guest_RE(self) -> NDArray[np.bool_]:
        """True where rank d computes rows of an expert it does not own."""
        away_RE = np.arange(self.homes.ranks)[:, None] != self.homes.rank_E[None, :]
        return (self.quota_RE > 0) & away_RE

    @property
    def guests(self) -> int:
        """Guest copies, summed over ranks."""
        return int(self.guest_RE.sum())

    @property
    def fits(self) -> bool:
        """Whether every rank is within the cap."""
        return int(self.rows_R.max(initial=0)) <= self.cap


class Planner(Protocol):
    """Turns the exact load of one layer and micro-batch into a plan.

    Implementations keep every column sum (no row is dropped), use at most `slots` guests a rank, are
    deterministic, and never load the fullest rank more than the identity plan does. Planners that
    remember (`periodic_replication`) see the same history on every rank.
    """

    name: str

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), non-negative. Raises nothing on any valid counts."""
        ...

    def slots_needed(self, homes: Homes) -> int:
        """The most guest slots a rank can need under this planner."""
        ...


def max_over_mean(rows_R: IntArray) -> float:
    """Load of the fullest rank over the mean load; 1.0 for no load at all."""
    total = int(rows_R.sum())
    return float(rows_R.max()) * rows_R.shape[0] / total if total else 1.0
