"""Plans remembered between a forward pass and its recomputation under activation checkpointing."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.placement.base import Plan


class Remembered(NamedTuple):
    """The plan of one forward call and the choice of experts it was made for."""

    plan: Plan
    ids_SK: Tensor


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


class PlanMemory:
    """Last in, first out: backward recomputes the latest forward first.

    A recomputation takes the remembered choice of experts with the plan: a kernel that is not bit-reproducible
    may flip a near tie, and rows must land where the first pass put them. Without checkpointing nothing is ever
    recalled, and old entries fall off the end.
    """

    def __init__(self, depth: int = 8) -> None:
        self._entries: deque[Remembered] = deque(maxlen=depth)

    def remember(self, plan: Plan, ids_SK: Tensor) -> None:
        self._entries.append(Remembered(plan, ids_SK))

    def recall(self) -> Remembered | None:
        """The latest entry, removed. None where the forward pass lies too far back: the caller plans anew,
        which every rank does alike."""
        return self._entries.pop() if self._entries else None
