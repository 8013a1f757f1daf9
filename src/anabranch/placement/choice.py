"""What one call of a layer does: its plan and its exchange, fixed by the user or chosen by price.

Shape suffixes: R ranks of the expert-parallel group, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from anabranch.placement.base import Homes, IntArray, Plan, Planner


class Exchange(NamedTuple):
    """How rows travel. transport: a name of the registry in `transport/choose.py`. chunks: pieces of a
    micro-batch whose dispatch, computation and combine overlap; 1 for none."""

    transport: str
    chunks: int = 1


class Choice(NamedTuple):
    """planner: the name of the planner that made the plan."""

    plan: Plan
    exchange: Exchange
    planner: str


Trial = Callable[[Choice], float]
"""Does the call at hand once aside, forward and backward, under any choice: ms of the slowest rank, which all ranks
are told. Collective; leaves nothing behind."""


class Chooser(Protocol):
    """Every rank of a group holds an equal one and shows it the same counts, so all choose alike."""

    def choose(self, counts_RE: IntArray, homes: Homes, trial: Trial | None = None) -> Choice:
        """counts_RE: int64 (R, E), rows that rank r routes to expert e. trial: None where calls cannot be tried."""
        ...

    def slots_needed(self, homes: Homes) -> int:
        """The most guest slots a rank can need under any choice."""
        ...


@dataclass(frozen=True)
class FixedChoice:
    """The same planner and exchange at every call."""

    planner: Planner
    exchange: Exchange

    def choose(self, counts_RE: IntArray, homes: Homes, trial: Trial | None = None) -> Choice:
        return Choice(self.planner.plan(counts_RE, homes), self.exchange, self.planner.name)

    def slots_needed(self, homes: Homes) -> int:
        return self.planner.slots_needed(homes)


@dataclass(frozen=True)
class BySize:
    """Inference: a choice for calls of up to `rows` rows, as decoding makes them, and one for larger, as prompts do."""

    small: FixedChoice
    large: FixedChoice
    rows: int

    def choose(self, counts_RE: IntArray, homes: Homes, trial: Trial | None = None) -> Choice:
        return (self.small if counts_RE.sum() <= self.rows else self.large).choose(counts_RE, homes)

    def slots_needed(self, homes: Homes) -> int:
        return max(self.small.slots_needed(homes), self.large.slots_needed(homes))
