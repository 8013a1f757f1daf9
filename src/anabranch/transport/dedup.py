"""One row per (token, destination rank): a token travels once to each rank that computes some of its experts.

The routing weights travel with it; the destination weighs and sums its experts' outputs, so one row returns.
Shape suffixes: see `base.py`; V (token, rank) pairs this rank sends, U tokens it receives.
"""

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.placement.assign import recv_RE, send_RE
from anabranch.placement.base import Plan
from anabranch.transport.base import Route, Seats, Transport, slots_of
from anabranch.transport.collectives import exchange_plain, exchange_rows, gather_plain
from anabranch.transport.rows import fan_in
from anabranch.transport.segments import expert_order, segment_index, starts


class _Tables(NamedTuple):
    token_V: Tensor  # token of each sent row, destination-major
    keep_VK: Tensor  # which of the token's experts this destination computes
    token_N: Tensor  # arrived token each computed row reads
    pick_N: Tensor  # place of the row's routing weight in the arrived (U * K) weights
    send_R: list[int]
    recv_R: list[int]


class Dedup(Transport):
    """Sends each token once per destination; costs one more small exchange (sizes and slots) than `all_to_all`."""

    name: ClassVar[str] = "dedup"

    def route(self, plan: Plan, seats: Seats, ids_SK: Tensor) -> Route:
        rank_SK, slot_SK = self._destinations(plan, seats, ids_SK)
        hit_RS = torch.zeros((self.ranks, ids_SK.shape[0]), dtype=torch.bool, device=ids_SK.device)
        hit_RS.scatter_(0, rank_SK.T, True)
        rank_V, token_V = hit_RS.nonzero(as_tuple=True)
        sizes_RR = gather_plain(hit_RS.sum(dim=1), self.group).view(self.ranks, self.ranks).cpu().numpy()
        send_R, recv_R = sizes_RR[self.rank], sizes_RR[:, self.rank]
        splits = (send_R.tolist(), recv_R.tolist())

        keep_VK = rank_SK[token_V] == rank_V.unsqueeze(-1)
        slot_VK = torch.where(keep_VK, slot_SK[token_V], seats.expert_RJ.shape[1])
        slot_UK = exchange_plain(slot_VK.to(torch.int32), *splits, self.group)
        rows_J = seats.per_slot(recv_RE(plan, self.rank), np.full(self.ranks, self.rank)).sum(axis=0)
        rows = int(rows_J.sum())
        # Slots past the last mark experts that another rank computes: the sort leaves them behind the rows.
        pick_N = expert_order(slot_UK.reshape(-1))[:rows]
        tables = _Tables(token_V, keep_VK, pick_N // ids_SK.shape[1], pick_N, *splits)
        away, returned = int(send_R.sum() - send_R[self.rank]), int(recv_R.sum() - recv_R[self.rank])
        return Route(slots_of(rows_J, seats.homes, ids_SK.device), rows, tables, away, returned)

    def _destinations(self, plan: Plan, seats: Seats, ids_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Rank and slot that compute each (token, k) pair."""
        device = ids_SK.device
        send_by_expert_RE = send_RE(plan, self.rank)
        first_RE = (
            starts(plan.counts_RE[self.rank]) + np.cumsum(send_by_expert_RE, axis=0) - send_by_expert_RE
        )
        ranks = np.arange(self.ranks)
        send_RJ, start_RJ = (seats.per_slot(a, ranks) for a in (send_by_expert_RE, first_RE))
        place_P = segment_index(start_RJ.ravel(), send_RJ.ravel(), device)
        order_P = expert_order(ids_SK.reshape(-1))[place_P]
        slots = send_RJ.shape[1]
        seat_P = torch.from_numpy(np.repeat(np.arange(send_RJ.size), send_RJ.ravel())).to(device)
        seat_SK = torch.empty_like(seat_P).scatter_(0, order_P, seat_P).view(ids_SK.shape)
        return seat_SK // slots, seat_SK % slots

    def dispatch(self, x_SD: Tensor, weights_SK: Tensor, route: Route) -> tuple[Tensor, Tensor | None]:
        t: _Tables = route.tables
        tokens_UD = exchange_rows(x_SD.index_select(0, t.token_V), t.send_R, t.recv_R, self.group)
        weights_VK = weights_SK.index_select(0, t.token_V) * t.keep_VK
        weights_UK = exchange_rows(weights_VK, t.send_R, t.recv_R, self.group)
        return tokens_UD.index_select(0, t.token_N), weights_UK.reshape(-1).index_select(0, t.pick_N)

    def combine(self, y_ND: Tensor, weight_N: Tensor | None, weights_SK: Tensor, route: Route) -> Tensor:
        assert weight_N is not None, "dedup weighs at the destination"
        t: _Tables = route.tables
        sums_UD = fan_in(y_ND, weight_N, t.token_N, sum(t.recv_R))
        back_VD = exchange_rows(sums_UD, t.recv_R, t.send_R, self.group)
        return fan_in(back_VD, None, t.token_V, weights_SK.shape[0])
