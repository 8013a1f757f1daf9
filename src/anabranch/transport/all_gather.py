"""Every rank sees every token: no exchange depends on the routing, so every buffer has a fixed size.

Tokens and routing weights are all-gathered, each rank computes the rows the plan gives it in a buffer of
`cap` rows, and the outputs are reduce-scattered. `dispatch` and `combine` read integer tables of fixed size
and call neither sort nor boolean indexing, so they compile once. Shape suffixes: see `base.py`; T = R * S
tokens of all ranks (each rank's padded to the largest S), C = cap rows.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.placement.base import IntArray, Plan
from anabranch.transport.base import Arrived, Hop, Route, Seats, Slots, Transport, Wires
from anabranch.transport.collectives import gather_plain, gather_rows, reduce_scatter_rows
from anabranch.transport.domain import Domain
from anabranch.transport.rows import fan_in
from anabranch.transport.segments import expert_order, segment_index, starts


class Tables(NamedTuple):
    """Integer inputs of the fixed-size layer. pick_C: place of each row in the gathered (T * K) pairs;
    real_C: 1 for a row of the plan, 0 for padding (which reads pair 0 and weighs nothing); tokens: largest S."""

    pick_C: Tensor
    real_C: Tensor
    tokens: int


class AllGather(Transport):
    """Fixed shapes and no host synchronisation after the plan; moves every token to every rank."""

    name: ClassVar[str] = "all_gather"
    fixed_size: ClassVar[bool] = True

    def __init__(self, domain: Domain, wires: Wires = Wires()) -> None:  # noqa: B008 - frozen
        super().__init__(domain, wires)
        if wires != Wires():
            raise ConfigError(
                "all_gather sums on its way back and sends rows as they are; use another transport, or no codecs",
                setting="dispatch_wire",
            )

    def route(self, plan: Plan, seats: Seats, ids_SK: Tensor, chunks: int = 1) -> tuple[Route, ...]:
        tokens_R = plan.counts_RE.sum(axis=1) // ids_SK.shape[1]
        padded = _pad(ids_SK, int(tokens_R.max()), plan.homes.experts)
        order_TK = expert_order(gather_plain(padded, self.group).reshape(-1))
        # All rows of an expert, in (rank, token) order, are dealt to its hosts in rank order.
        first_E = starts(plan.counts_RE.sum(axis=0)) + plan.quota_RE[: self.rank].sum(axis=0)
        mine = np.array([self.rank])
        rows_J = seats.per_slot(plan.quota_RE[self.rank : self.rank + 1], mine)[0]
        start_J = seats.per_slot(first_E[None], mine)[0]
        pick_N = order_TK[segment_index(start_J, rows_J, ids_SK.device)]
        capacity = max(plan.cap, int(plan.rows_R.max()))
        slots, pick_C, real_C = _pad_to(capacity, pick_N, rows_J, seats.homes)
        tables = Tables(pick_C, real_C, int(tokens_R.max()))
        # A padded all-gather sends this rank's tokens to the others and as many partial sums return.
        away = self.sent(np.full(self.ranks, tables.tokens))
        tokens = slice(0, ids_SK.shape[0])
        return (Route(slots, int(rows_J.sum()), tables, (Hop(away, away),), tokens),)

    def dispatch(self, x_SD: Tensor, weights_SK: Tensor, route: Route) -> Callable[[], Arrived]:
        t: Tables = route.tables
        x_TD = gather_rows(_pad(x_SD, t.tokens, 0), self.group)
        weights_TK = gather_rows(_pad(weights_SK, t.tokens, 0), self.group)
        rows_CD = x_TD.index_select(0, t.pick_C // weights_SK.shape[1])
        weight_C = weights_TK.reshape(-1).index_select(0, t.pick_C) * t.real_C
        return lambda: Arrived(rows_CD, weight_C)

    def combine(
        self, y_ND: Tensor, weight_N: Tensor | None, weights_SK: Tensor, route: Route
    ) -> Callable[[], Tensor]:
        assert weight_N is not None, "all_gather weighs at the destination"
        t: Tables = route.tables
        sums_TD = fan_in(y_ND, weight_N, t.pick_C // weights_SK.shape[1], t.tokens * self.ranks)
        y_SD = reduce_scatter_rows(sums_TD, self.group)
        tokens = weights_SK.shape[0]
        # A copy, and only where this rank has padding: FSDP2 hooks what a layer returns, which must not be a view.
        own_SD = y_SD if tokens == t.tokens else y_SD[:tokens].clone()
        return lambda: own_SD


def _pad(rows_S: Tensor, tokens: int, value: int) -> Tensor:
    """(S, ...) to (tokens, ...), so that ranks with fewer tokens take part in an even all-gather."""
    missing = tokens - rows_S.shape[0]
    if missing == 0:
        return rows_S
    return torch.cat([rows_S, rows_S.new_full((missing, *rows_S.shape[1:]), value)])


def _pad_to(capacity: int, pick_N: Tensor, rows_J: IntArray, homes: int) -> tuple[Slots, Tensor, Tensor]:
    """Fill the buffer up to `capacity` rows; the padding belongs to the last slot, so the groups tile the buffer."""
    filled_J = rows_J.copy()
    filled_J[-1] += capacity - int(rows_J.sum())
    device = pick_N.device
    pick_C = torch.zeros(capacity, dtype=torch.int64, device=device)
    pick_C[: pick_N.shape[0]] = pick_N
    real_C = torch.zeros(capacity, dtype=torch.float32, device=device)
    real_C[: pick_N.shape[0]] = 1.0
    ends_J = torch.from_numpy(np.cumsum(filled_J).astype(np.int32)).to(device)
    slot_C = torch.from_numpy(np.repeat(np.arange(filled_J.size), filled_J)).to(device)
    return Slots(ends_J, slot_C, int(filled_J[:homes].sum())), pick_C, real_C
