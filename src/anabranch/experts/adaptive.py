"""The adaptive layer: one call of a Mixture-of-Experts layer, balanced over the ranks of a process group.

Shape suffixes: R ranks, E experts, S tokens of this rank, K experts a token, D hidden size, N rows computed
here, L home slots, B guest slots, J = L + B slots.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.errors import PlanError
from anabranch.experts.grouped import ExpertsForward
from anabranch.experts.guests import lend, tie
from anabranch.experts.memory import PlanMemory, recomputing
from anabranch.experts.seating import GuestTable, guest_table, seat
from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.choice import Choice, Chooser, Exchange, Trial
from anabranch.transport.base import Route, Slots, Traffic, Transport
from anabranch.transport.collectives import gather_counts


class Observation(NamedTuple):
    """What one forward call did, as seen by one rank. Bytes are those this rank sends in forward and backward;
    plan_ms is the time of choosing and planning, without waiting for other ranks' counts."""

    choice: Choice
    ids_SK: Tensor
    tokens: Traffic
    weights: Traffic
    plan_ms: float

    @property
    def plan(self) -> Plan:
        return self.choice.plan

    @property
    def token_bytes(self) -> int:
        return sum(self.tokens)

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights)


class Call(NamedTuple):
    """The arguments of one forward call."""

    home: Sequence[Tensor]
    x_SD: Tensor
    ids_SK: Tensor
    weights_SK: Tensor


class Prepared(NamedTuple):
    """All integer decisions of one call: inputs of the tensor part, data rather than shapes where sizes are fixed.

    transport: its name. routes: one for each chunk of the tokens.
    """

    transport: str
    routes: tuple[Route, ...]
    table: GuestTable
    lends: bool


class AdaptiveExperts:
    """A layer's experts, spread over a group, with guests where the load asks for them.

    One call:
    1. every rank counts its rows per expert; the counts are all-gathered (R * E int32) and read on the host;
    2. every rank chooses the same plan and exchange; under activation checkpointing the first pass's are reused;
    3. the transport decides which row goes where (integers only);
    4. weights of guests are lent, where the plan has any;
    5. rows are dispatched, computed by [homes | guests] in slot order, and combined. In several chunks, one
       chunk's dispatch and another's combine travel while a third is computed.
    Backward runs 5 to 4 reversed: gradients of guests return home and are summed there in fp32.

    Allocated beyond the rows themselves: the guests' weights and their packed send and receive buffers. Home
    parameters are never copied by a transport of exact sizes (homes and guests are two grouped calls); a
    fixed-size transport copies them once per forward, into the [homes | guests] operand of its single call, and
    autograd keeps that operand until backward.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        homes: Homes,
        chooser: Chooser,
        transports: Mapping[str, Transport],
        forward: ExpertsForward,
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.homes = homes
        self.chooser = chooser
        self.transports = transports
        # With uneven homes the last home slot may be empty; a guest slot then takes the padding of fixed buffers.
        self.slots = max(chooser.slots_needed(homes), 1 if homes.experts % homes.ranks else 0)
        self.forward = forward
        self.memory = PlanMemory()
        self.observers: list[Callable[[Observation], None]] = []
        self.trial_of: Callable[[AdaptiveExperts, Call], Trial] | None = None
        """How a chooser may try calls before it chooses; None where it may not."""
        self._foreseen: deque[Choice] = deque()
        self._plan_ms = 0.0

    def __call__(self, home: Sequence[Tensor], x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor) -> Tensor:
        """(S, D): the weighted sum of each token's experts.

        home: this rank's expert parameters, each (experts at home, ...). ids_SK: global expert ids.
        """
        again = recomputing()
        choice = None
        if again and (remembered := self.memory.recall(ids_SK)) is not None:
            choice, ids_SK = remembered.choice, remembered.ids_SK
        trial = self.trial_of and not again and self.trial_of(self, Call(home, x_SD, ids_SK, weights_SK))
        choice = choice or self.choose(ids_SK, trial or None)
        if not again:
            self.memory.remember(choice, ids_SK)
        prepared = self.prepare(choice.plan, choice.exchange, ids_SK)
        y_SD = self.run(home, x_SD, weights_SK, prepared)
        if not again and self.observers:
            tokens = self.transports[prepared.transport].traffic(prepared.routes, x_SD.shape[1], x_SD.dtype)
            self._observe(choice, ids_SK, tokens, prepared.table, home)
        return y_SD

    def foresee(self, counts_MRE: IntArray) -> None:
        """Choose now for the coming calls, of which all ranks know the counts. Forgets what was foreseen before."""
        self._foreseen = deque(self.chooser.choose(counts_RE, self.homes) for counts_RE in counts_MRE)

    def choose(self, ids_SK: Tensor, trial: Trial | None = None) -> Choice:
        """What this call does; `trial` tries it. Collective, unless foreseen: every rank sees the counts of all.

        Raises PlanError where a foreseen call has other counts; other ranks then wait for this one in vain.
        """
        counts_E = torch.bincount(ids_SK.reshape(-1), minlength=self.homes.experts)
        if self._foreseen:
            self._plan_ms = 0.0
            choice = self._foreseen.popleft()
            if not np.array_equal(choice.plan.counts_RE[self.rank], counts_E.cpu().numpy()):
                raise PlanError(
                    "was not what its plan was made for; run the update within `replay`", setting="routing"
                )
            return choice
        counts_RE = gather_counts(counts_E, self.group).numpy().astype("int64")
        started_s = time.perf_counter()
        choice = self.chooser.choose(counts_RE, self.homes, trial)
        self._plan_ms = 1e3 * (time.perf_counter() - started_s)
        return choice

    def prepare(self, plan: Plan, exchange: Exchange, ids_SK: Tensor) -> Prepared:
        """Turn a plan into the integer tables of one call. Collective."""
        transport = self.transports[exchange.transport]
        fixed = transport.fixed_size
        seats = seat(plan, self.slots if fixed else None)
        table = guest_table(plan, seats, self.rank, fixed=fixed, device=ids_SK.device)
        lends = self.slots > 0 if fixed else table.copies > 0
        routes = transport.route(plan, seats, ids_SK, exchange.chunks)
        return Prepared(exchange.transport, routes, table, lends)

    def run(self, home: Sequence[Tensor], x_SD: Tensor, weights_SK: Tensor, prepared: Prepared) -> Tensor:
        """The tensor part: no decision is taken here. With a fixed-size transport it compiles once."""
        home, guests = list(home), []
        if prepared.lends:
            # Before the dispatch, so that its backward comes last on every rank, whatever each rank computed.
            home, guests = lend(home, prepared.table, self.group)
        if len(prepared.routes) == 1:
            chunks = [(x_SD, weights_SK)]
        else:
            sizes = [route.tokens.stop - route.tokens.start for route in prepared.routes]
            chunks = list(zip(x_SD.split(sizes), weights_SK.split(sizes), strict=True))
        return self._overlapped(home, guests, chunks, prepared).to(x_SD.dtype)

    def _overlapped(
        self,
        home: list[Tensor],
        guests: list[Tensor],
        chunks: list[tuple[Tensor, Tensor]],
        prepared: Prepared,
    ) -> Tensor:
        """While a chunk is computed, the next one arrives and the last one leaves; at most one of each."""
        transport, routes = self.transports[prepared.transport], prepared.routes
        compute = self._compute_fixed if transport.fixed_size else self._compute_exact
        arriving = transport.dispatch(*chunks[0], routes[0])
        leaving: Callable[[], Tensor] | None = None
        done: list[Tensor] = []
        for place, route in enumerate(routes):
            rows_ND, weight_N = arriving()
            if place + 1 < len(routes):
                arriving = transport.dispatch(*chunks[place + 1], routes[place + 1])
            y_ND = compute(home, guests, rows_ND, route.slots)
            if leaving is not None:
                done.append(leaving())
            leaving = transport.combine(y_ND, weight_N, chunks[place][1], route)
        assert leaving is not None
        done.append(leaving())
        return done[0] if len(done) == 1 else torch.cat(done)

    def _compute_exact(
        self, home: list[Tensor], guests: list[Tensor], rows_ND: Tensor, slots: Slots
    ) -> Tensor:
        """Homes and guests as two grouped calls on neighbouring rows, so that home weights stay where they are."""
        n, own = slots.home_rows, home[0].shape[0]
        home_rows, guest_rows = rows_ND.split([n, rows_ND.shape[0] - n])
        parts = []
        if n > 0:
            parts.append(self.forward(home, home_rows, slots.ends_J[:own], slots.slot_N[:n]))
        if guest_rows.shape[0] > 0:
            first = self.homes.slots
            # A rank with fewer guests than the fullest has no weights for its empty slots; those come last.
            guest_ends = slots.ends_J[first : first + guests[0].shape[0]] - n
            parts.append(self.forward(guests, guest_rows, guest_ends, slots.slot_N[n:] - first))
        if not parts and own > 0:
            # Nothing to compute, but the model's code may hold parameters of its own beside the experts' (a norm
            # after them), whose gradients are reduced over all ranks: it runs on a row that nobody reads.
            nothing = rows_ND.new_zeros((1, rows_ND.shape[1]))
            ends_J, slot_N = slots.ends_J[:own] * 0 + 1, slots.ends_J.new_zeros(1, dtype=torch.int64)
            parts.append(torch.cat([rows_ND, self.forward(home, nothing, ends_J, slot_N)[:0]]))
        y_ND = torch.cat(parts) if len(parts) == 2 else parts[0] if parts else rows_ND
        return tie(y_ND, home + guests, [n == 0] * len(home) + [False] * len(guests))

    def _compute_fixed(
        self, home: list[Tensor], guests: list[Tensor], rows_ND: Tensor, slots: Slots
    ) -> Tensor:
        """One grouped call over [homes | guests]: the same shapes whatever the plan."""
        own, first = home[0].shape[0], self.homes.slots
        weights = [torch.cat(pair) for pair in zip(home, guests, strict=True)] if guests else home
        # A rank with fewer homes than slots has no weights for the empty ones; they hold no rows.
        ends_J = torch.cat([slots.ends_J[:own], slots.ends_J[first:]])
        slot_N = torch.where(slots.slot_N >= first, slots.slot_N - (first - own), slots.slot_N)
        return self.forward(weights, rows_ND, ends_J, slot_N)

    def _observe(
        self, choice: Choice, ids_SK: Tensor, tokens: Traffic, table: GuestTable, home: Sequence[Tensor]
    ) -> None:
        expert_bytes = sum(torch.Size(p.shape[1:]).numel() * p.element_size() for p in home)
        # Lent in forward, returned as gradients in backward.
        sent = self.transports[choice.exchange.transport].sent(table.experts_moved_R)
        weights = Traffic(sent.intra * expert_bytes, sent.inter * expert_bytes)
        seen = Observation(choice, ids_SK, tokens, weights, self._plan_ms)
        for observer in self.observers:
            observer(seen)
