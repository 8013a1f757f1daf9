"""One row per (token, expert) pair: every row travels to its rank and back by itself.

Shape suffixes: see `base.py`.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from anabranch.placement.assign import recv_RE
from anabranch.placement.base import Plan
from anabranch.transport.base import Arrived, Hop, Route, Seats, Transport, outgoing, slots_of
from anabranch.transport.flight import Flight
from anabranch.transport.rows import permute, spread, weigh
from anabranch.transport.segments import expert_order, inverse_order, segment_index, starts


class _Tables(NamedTuple):
    order_P: Tensor  # row sent at place p is (token, k) pair order_P[p]
    inverse_P: Tensor
    by_slot_N: Tensor  # arrived rows, source-major, read slot-major
    by_source_N: Tensor
    send_R: list[int]
    recv_R: list[int]


class AllToAll(Transport):
    """Sends exactly the rows the plan names; the plan tells receivers what they get, so no sizes are exchanged."""

    name: ClassVar[str] = "all_to_all"

    def route(self, plan: Plan, seats: Seats, ids_SK: Tensor, chunks: int = 1) -> tuple[Route, ...]:
        device = ids_SK.device
        start_RJ, send_RJ = outgoing(plan, seats, self.rank)
        order_P = expert_order(ids_SK.reshape(-1))[segment_index(start_RJ.ravel(), send_RJ.ravel(), device)]

        recv_SJ = seats.per_slot(recv_RE(plan, self.rank), np.full(self.ranks, self.rank))
        arrived_SJ = starts(recv_SJ.ravel()).reshape(recv_SJ.shape)
        by_slot_N = segment_index(arrived_SJ.T.ravel(), recv_SJ.T.ravel(), device)
        send_R, recv_R = send_RJ.sum(axis=1), recv_SJ.sum(axis=1)
        tables = _Tables(
            order_P,
            inverse_order(order_P),
            by_slot_N,
            inverse_order(by_slot_N),
            send_R.tolist(),
            recv_R.tolist(),
        )
        slots = slots_of(recv_SJ.sum(axis=0), seats.homes, device)
        hop = Hop(self.sent(send_R), self.sent(recv_R))
        return (Route(slots, int(recv_R.sum()), tables, (hop,), slice(0, ids_SK.shape[0])),)

    def dispatch(self, x_SD: Tensor, weights_SK: Tensor, route: Route) -> Callable[[], Arrived]:
        t: _Tables = route.tables
        flight = Flight(self.lanes, t.send_R, t.recv_R, self.dispatch_codec)
        pending_ND = flight.depart(spread(x_SD, t.order_P, t.inverse_P, weights_SK.shape[1]))
        return lambda: Arrived(permute(flight.arrive(pending_ND), t.by_slot_N, t.by_source_N), None)

    def combine(
        self, y_ND: Tensor, weight_N: Tensor | None, weights_SK: Tensor, route: Route
    ) -> Callable[[], Tensor]:
        t: _Tables = route.tables
        flight = Flight(self.lanes, t.recv_R, t.send_R, self.combine_codec)
        pending_PD = flight.depart(permute(y_ND, t.by_source_N, t.by_slot_N))

        def land() -> Tensor:
            y_PD = permute(flight.arrive(pending_PD), t.inverse_P, t.order_P)
            return weigh(y_PD.view(*weights_SK.shape, y_PD.shape[-1]), weights_SK)

        return land
