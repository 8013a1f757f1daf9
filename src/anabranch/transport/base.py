"""The contract of a transport: how rows reach the rank that computes them, and come back.

Shape suffixes: R ranks, E experts, S tokens of this rank, K experts a token, P = S * K rows this rank sends,
N rows this rank computes, J slots of a rank (L homes, then B guests), D hidden size.

One layer call is `route` (integers only, no gradient), `dispatch`, the experts' computation, `combine`.
Rows arrive sorted by slot. `dispatch` and `combine` start an exchange and return its *landing*, which waits
for it: what is computed in between overlaps. A transport may keep nothing between calls; everything a backward
pass needs is in the autograd graph or in the `Route`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.placement.assign import send_RE
from anabranch.placement.base import IntArray, Plan
from anabranch.transport.codecs.base import Codec
from anabranch.transport.codecs.choose import check_codec, make_codec
from anabranch.transport.domain import Domain
from anabranch.transport.segments import starts


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


class Outgoing(NamedTuple):
    """int64 (R, J) each: the first row of every seat's stretch, and its rows."""

    start_RJ: IntArray
    rows_RJ: IntArray


class Arrived(NamedTuple):
    """Rows for this rank's slots, (N, D) sorted by slot, and their routing weights (N,) where they travel."""

    rows_ND: Tensor
    weight_N: Tensor | None


class Sent(NamedTuple):
    """Tokens (or rows) this rank sends to other ranks: of its own node, and of other nodes."""

    intra: int
    inter: int


class Hop(NamedTuple):
    """One exchange of a route: tokens sent in dispatch, sent back in combine. wired: whether codecs apply."""

    sent: Sent
    returned: Sent
    wired: bool = True


class Traffic(NamedTuple):
    """Bytes that one rank sends to other ranks, in one forward pass and its backward."""

    intra_bytes: int
    inter_bytes: int


@dataclass(frozen=True)
class Wires:
    """Names of the codecs of dispatch and of combine; `none` sends rows as they are.

    Raises ConfigError for an unknown name.
    """

    dispatch: str = "none"
    combine: str = "none"

    def __post_init__(self) -> None:
        check_codec(self.dispatch, "dispatch_wire")
        check_codec(self.combine, "combine_wire")

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        return make_codec(self.dispatch), make_codec(self.combine)


@dataclass(frozen=True)
class Route:
    """What `Transport.route` decided for a range of tokens. `tables` are the transport's own integer tensors;
    `hops` count what leaves this rank; token_bytes are what a token carries beside its row in (there, back)."""

    slots: Slots
    rows: int
    tables: Any
    hops: tuple[Hop, ...]
    tokens: slice
    token_bytes: tuple[int, int] = (0, 0)


class Transport(ABC):
    """Moves rows between the ranks of one domain."""

    name: ClassVar[str]
    fixed_size: ClassVar[bool] = False
    """Whether every buffer has the size of the plan's cap and slots, whatever the routing."""

    def __init__(self, domain: Domain, wires: Wires = Wires()) -> None:
        self.domain = domain
        self.group, self.lanes = domain.group, domain.lanes
        self.rank, self.ranks = domain.rank, domain.ranks
        self.dispatch_codec, self.combine_codec = wires.codecs()

    @abstractmethod
    def route(self, plan: Plan, seats: Seats, ids_SK: Tensor, chunks: int = 1) -> tuple[Route, ...]:
        """Decide which row goes where, for each of `chunks` ranges of tokens. Every rank of the group calls it
        with the same plan. A transport that cannot divide its tokens returns one route."""

    @abstractmethod
    def dispatch(self, x_SD: Tensor, weights_SK: Tensor, route: Route) -> Callable[[], Arrived]:
        """Start sending the route's tokens; S counts only these. Returns the landing."""

    @abstractmethod
    def combine(
        self, y_ND: Tensor, weight_N: Tensor | None, weights_SK: Tensor, route: Route
    ) -> Callable[[], Tensor]:
        """Start sending the experts' outputs back. The landing returns (S, D): the weighted sum of each token's
        experts, back on its rank."""

    def traffic(self, routes: tuple[Route, ...], hidden: int, dtype: torch.dtype) -> Traffic:
        """Bytes of rows, weights and slots this rank sends. Backward sends rows both ways as forward does."""
        plain = hidden * dtype.itemsize
        there = self.dispatch_codec.row_bytes(hidden) if self.dispatch_codec else plain
        back = self.combine_codec.row_bytes(hidden) if self.combine_codec else plain
        intra = inter = 0
        for route in routes:
            for hop in route.hops:
                out = 2 * (there if hop.wired else plain) + route.token_bytes[0]
                home = 2 * (back if hop.wired else plain) + route.token_bytes[1]
                intra += hop.sent.intra * out + hop.returned.intra * home
                inter += hop.sent.inter * out + hop.returned.inter * home
        return Traffic(intra, inter)

    def sent(self, rows_R: IntArray) -> Sent:
        """Rows this rank sends to each rank of the group, by the class of the link; its own stay."""
        near_R = self.domain.nodes.node_R == self.domain.nodes.node_R[self.rank]
        return Sent(int(rows_R[near_R].sum() - rows_R[self.rank]), int(rows_R[~near_R].sum()))


def outgoing(plan: Plan, seats: Seats, rank: int) -> Outgoing:
    """Where the rows of `rank` go: sorted by expert, they fall into one stretch for each seat."""
    sent_RE = send_RE(plan, rank)
    # A source hands its rows of an expert to the destinations in rank order.
    first_RE = starts(plan.counts_RE[rank]) + np.cumsum(sent_RE, axis=0) - sent_RE
    ranks = np.arange(plan.homes.ranks)
    return Outgoing(seats.per_slot(first_RE, ranks), seats.per_slot(sent_RE, ranks))


def slots_of(rows_J: IntArray, homes: int, device: torch.device) -> Slots:
    """`Slots` of a rank that computes rows_J rows per slot."""
    ends_J = torch.from_numpy(np.cumsum(rows_J).astype(np.int32)).to(device, non_blocking=True)
    slot_N = torch.from_numpy(np.repeat(np.arange(rows_J.size), rows_J)).to(device, non_blocking=True)
    return Slots(ends_J, slot_N, int(rows_J[:homes].sum()))
