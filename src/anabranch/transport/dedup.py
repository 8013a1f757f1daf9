"""One row per (token, destination rank): a token travels once to each rank that computes some of its experts.

The routing weights travel with it; the destination weighs and sums its experts' outputs, so one row returns.
Shape suffixes: see `base.py`; V copies this rank sends, U tokens it receives.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.placement.assign import recv_RE
from anabranch.placement.base import IntArray, Plan
from anabranch.transport.base import (
    Arrived,
    Hop,
    Route,
    Seats,
    Sent,
    Slots,
    Transport,
    Wires,
    outgoing,
    slots_of,
)
from anabranch.transport.codecs.base import Codec
from anabranch.transport.domain import Domain
from anabranch.transport.lanes import Lanes
from anabranch.transport.leg import Leg, make_legs
from anabranch.transport.rows import fan_in
from anabranch.transport.segments import expert_order, segment_index


class Stage(NamedTuple):
    """One exchange on the way. member_R: the member of `lanes` through which each rank of the domain is reached.

    far_M: members on other nodes. wired: whether codecs apply.
    """

    lanes: Lanes
    member_R: Tensor
    far_M: IntArray
    wired: bool


class _Tables(NamedTuple):
    """legs: one a stage. token_N: arrived token each computed row reads; pick_N: place of the row's routing
    weight in the arrived (U * K) weights."""

    legs: list[Leg]
    token_N: Tensor
    pick_N: Tensor


class Dedup(Transport):
    """Sends each token once per destination; costs two more small exchanges (sizes, slots) than `all_to_all`."""

    name: ClassVar[str] = "dedup"

    def __init__(self, domain: Domain, wires: Wires = Wires()) -> None:  # noqa: B008 - frozen
        super().__init__(domain, wires)
        self.stages = self._stages()

    def _stages(self) -> tuple[Stage, ...]:
        nodes = self.domain.nodes
        far_R = (nodes.node_R != nodes.node_R[self.rank]).astype(np.int64)
        return (Stage(self.lanes, torch.arange(self.ranks), far_R, wired=True),)

    def route(self, plan: Plan, seats: Seats, ids_SK: Tensor, chunks: int = 1) -> tuple[Route, ...]:
        tokens, slots = ids_SK.shape[0], seats.expert_RJ.shape[1]
        bounds = [tokens * chunk // chunks for chunk in range(chunks + 1)]
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        code_SK = seat_codes(plan, seats, self.rank, ids_SK)
        by_stage: list[list[Leg]] = []
        for stage in self.stages:
            member_SK = stage.member_R.to(code_SK.device)[code_SK.clamp(min=0) // slots]
            legs = make_legs(torch.where(code_SK >= 0, member_SK, -1), code_SK, bounds, stage.lanes.up)
            by_stage.append(legs)
            code_SK = torch.cat([leg.code_UK for leg in legs]) if chunks > 1 else legs[0].code_UK
            bounds = [0, *np.cumsum([leg.code_UK.shape[0] for leg in legs]).tolist()]
        rows_CJ = self._rows(plan, seats, [leg.code_UK for leg in by_stage[-1]])
        paths = [list(path) for path in zip(*by_stage, strict=True)]
        return tuple(
            self._route(path, span, rows_J, seats)
            for path, span, rows_J in zip(paths, spans, rows_CJ, strict=True)
        )

    def _rows(self, plan: Plan, seats: Seats, codes: list[Tensor]) -> IntArray:
        """int64 (chunks, J): rows computed here. Whole micro-batches need no look at the codes."""
        slots = seats.expert_RJ.shape[1]
        if len(codes) == 1:
            mine = seats.per_slot(recv_RE(plan, self.rank), np.full(self.ranks, self.rank))
            return mine.sum(axis=0)[None]
        counted = [torch.bincount(_slot(code, slots).reshape(-1), minlength=slots + 1) for code in codes]
        return torch.stack(counted).cpu().numpy()[:, :slots]

    def _route(self, path: list[Leg], span: slice, rows_J: IntArray, seats: Seats) -> Route:
        slot_UK = _slot(path[-1].code_UK, rows_J.size)
        top_k, rows = slot_UK.shape[1], int(rows_J.sum())
        # Choices that other ranks compute sort behind the last slot.
        pick_N = expert_order(slot_UK.reshape(-1))[:rows]
        tables = _Tables(path, pick_N // top_k, pick_N)
        hops = tuple(_hop(stage, leg) for stage, leg in zip(self.stages, path, strict=True))
        slots: Slots = slots_of(rows_J, seats.homes, slot_UK.device)
        # Beside its row a token carries K fp32 weights and K slots; the weights' gradients come back.
        return Route(slots, rows, tables, hops, span, (8 * top_k, 4 * top_k))

    def dispatch(self, x_SD: Tensor, weights_SK: Tensor, route: Route) -> Callable[[], Arrived]:
        t: _Tables = route.tables
        first, *rest = zip(self.stages, t.legs, strict=True)
        landing = first[1].out(x_SD, weights_SK, first[0].lanes, self._codec(first[0], self.dispatch_codec))

        def land() -> Arrived:
            carried = landing()
            for stage, leg in rest:
                carried = leg.out(*carried, stage.lanes, self._codec(stage, self.dispatch_codec))()
            weight_N = carried.weights_UK.reshape(-1).index_select(0, t.pick_N)
            return Arrived(carried.x_UD.index_select(0, t.token_N), weight_N)

        return land

    def combine(
        self, y_ND: Tensor, weight_N: Tensor | None, weights_SK: Tensor, route: Route
    ) -> Callable[[], Tensor]:
        assert weight_N is not None, "weights travel with the tokens"
        t: _Tables = route.tables
        sums_UD = fan_in(y_ND, weight_N, t.token_N, t.legs[-1].code_UK.shape[0])
        # Each stage but the first returns its sums to the tokens that the stage before it received.
        for stage, leg, before in zip(self.stages[:0:-1], t.legs[:0:-1], t.legs[-2::-1], strict=True):
            codec = self._codec(stage, self.combine_codec)
            sums_UD = leg.home(sums_UD, before.code_UK.shape[0], stage.lanes, codec)()
        stage = self.stages[0]
        return t.legs[0].home(
            sums_UD, weights_SK.shape[0], stage.lanes, self._codec(stage, self.combine_codec)
        )

    def _codec(self, stage: Stage, codec: Codec | None) -> Codec | None:
        return codec if stage.wired else None


def seat_codes(plan: Plan, seats: Seats, rank: int, ids_SK: Tensor) -> Tensor:
    """int32 (S, K): rank * J + slot of the seat that computes each choice of `rank`'s tokens."""
    start_RJ, rows_RJ = outgoing(plan, seats, rank)
    order_P = expert_order(ids_SK.reshape(-1))[
        segment_index(start_RJ.ravel(), rows_RJ.ravel(), ids_SK.device)
    ]
    seat_P = torch.from_numpy(np.repeat(np.arange(rows_RJ.size, dtype=np.int32), rows_RJ.ravel()))
    seat_P = seat_P.to(ids_SK.device)
    return torch.empty_like(seat_P).scatter_(0, order_P, seat_P).view(ids_SK.shape)


def _slot(code_UK: Tensor, slots: int) -> Tensor:
    """The slot of each choice computed here, `slots` for the others'."""
    return torch.where(code_UK >= 0, code_UK % slots, slots)


def _hop(stage: Stage, leg: Leg) -> Hop:
    # A member's own tokens stay where they are; far_M is 0 there.
    own = stage.lanes.rank
    sent, returned = (
        Sent(int(n_M[stage.far_M == 0].sum() - n_M[own]), int(n_M[stage.far_M == 1].sum()))
        for n_M in (leg.send_M, leg.recv_M)
    )
    return Hop(sent, returned, stage.wired)
