"""Plans remembered between a forward pass and its recomputation under activation checkpointing."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.errors import PlanError
from anabranch.placement.choice import Choice

OUT_OF_ORDER = (
    "a recomputed layer does not fit the latest forward pass: under activation checkpointing call backward on the "
    "latest micro-batch first (or on the sum of the losses)"
)


class Remembered(NamedTuple):
    """The plan and exchange of one forward call, and the choice of experts they were made for."""

    choice: Choice
    ids_SK: Tensor
    without_grad: bool = False

    def fits(self, ids_SK: Tensor) -> Tensor:
        """bool (): whether at most one choice in eight differs, as near ties may."""
        return (self.ids_SK != ids_SK).sum() <= ids_SK.numel() // 8 + 1


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

    def remember(self, choice: Choice, ids_SK: Tensor) -> None:
        self._entries.append(Remembered(choice, ids_SK, not torch.is_grad_enabled()))

    def recall(self, ids_SK: Tensor) -> Remembered | None:
        """The latest entry, removed. None where the forward pass lies too far back: the caller plans anew,
        which every rank does alike.

        ids_SK: the recomputed choice of experts. A forward pass without gradients may be an evaluation between
        forward and backward (or the first pass of a reentrant checkpoint): it is passed over where it does not fit.
        Otherwise raises PlanError where the latest pass had another number of tokens, and fails (on accelerators
        without waiting for the device) where it does not fit: backward did not come to the latest pass first.
        """
        while self._entries:
            latest = self._entries.pop()
            same_shape = latest.ids_SK.shape == ids_SK.shape
            if latest.without_grad and not (same_shape and bool(latest.fits(ids_SK))):
                continue
            if not same_shape:
                raise PlanError(OUT_OF_ORDER, setting="activation_checkpointing")
            torch._assert_async(latest.fits(ids_SK), f"activation_checkpointing: {OUT_OF_ORDER}")
            return latest
        return None
