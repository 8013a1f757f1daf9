"""The contract of a transport: how rows reach the rank that computes them, and come back.

Shape suffixes: R ranks, E experts, S tokens of this rank, K experts a token, P = S * K rows this rank sends,
N rows this rank computes, J slots of a rank (L homes, then B guests), D hidden size.

One layer call is `route` (integers only, no gradient), `dispatch`, the experts' computation, `combine`.
Rows arrive sorted by slot. A transport may keep nothing between calls; everything a backward pass needs
is in the autograd graph or in the `Route`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.placement.base import IntArray, Plan


@dataclass(frozen=True)
class Seats:
    """Which expert sits in which slot of which rank under a plan.

    expert_RJ: expert id in slot j of rank d, -1 where the slot is empty. Slots [0, L) are homes, [L, L + B) guests.
    """

    expert_RJ: IntArray
    homes: int

    @property
    def guests(self) -> int:
        return int(self.expert_RJ.shape[1]) - self.homes

    def per_slot(self, rows_RE: IntArray, ranks: IntArray) -> IntArray:
        """Rows per expert to rows per slot: out[i, j] = rows_RE[i, expert in slot j of ranks[i]], 0 if empty."""
        expert_IJ = self.expert_RJ[ranks]
        taken_IJ = np.take_along_axis(rows_RE, np.maximum(expert_IJ, 0), axis=1)
        return np.where(expert_IJ >= 0, taken_IJ, 0)


class Slots(NamedTuple):
    """Rows by slot, on one rank. ends_J: int32 (J,), cumulative rows; slot_N: int64 (N,), ascending."""

    ends_J: Tensor
    slot_N: Tensor
    home_rows: int


class Traffic(NamedTuple):
    """Bytes of tokens this rank sends to other ranks in one forward pass (the backward pass sends as much)."""

    dispatch_bytes: int
    combine_bytes: int


@dataclass(frozen=True)
class Route:
    """What `Transport.route` decided. `tables` are the transport's own integer tensors."""

    slots: Slots
    rows: int
    tables: Any
    sent_tokens: int
    returned_tokens: int

    def traffic(self, row_bytes: int) -> Traffic:
        return Traffic(self.sent_tokens * row_bytes, self.returned_tokens * row_bytes)


class Transport(ABC):
    """Moves rows between the ranks of one process group."""

    name: ClassVar[str]
    fixed_size: ClassVar[bool] = False
    """Whether every buffer has the size of the plan's cap and slots, whatever the routing."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)

    @abstractmethod
    def route(self, plan: Plan, seats: Seats, ids_SK: Tensor) -> Route:
        """Decide which row goes where. Every rank of the group calls it with the same plan."""

    @abstractmethod
    def dispatch(self, x_SD: Tensor, weights_SK: Tensor, route: Route) -> tuple[Tensor, Tensor | None]:
        """Rows for this rank's slots, (N, D) sorted by slot, and their routing weights (N,) where they travel."""

    @abstractmethod
    def combine(self, y_ND: Tensor, weight_N: Tensor | None, weights_SK: Tensor, route: Route) -> Tensor:
        """(S, D): the weighted sum of each token's experts, back on its rank."""


def slots_of(rows_J: IntArray, homes: int, device: torch.device) -> Slots:
    """`Slots` of a rank that computes rows_J rows per slot."""
    ends_J = torch.from_numpy(np.cumsum(rows_J).astype(np.int32)).to(device, non_blocking=True)
    slot_N = torch.from_numpy(np.repeat(np.arange(rows_J.size), rows_J)).to(device, non_blocking=True)
    return Slots(ends_J, slot_N, int(rows_J[:homes].sum()))
