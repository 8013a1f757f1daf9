"""What one call of a layer takes, forward and backward, under a plan and an exchange.

Shape suffixes: R ranks, E experts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from anabranch.costs.computation import Computation
from anabranch.costs.links import Busiest, Links
from anabranch.costs.traffic import TRANSFORMERS, Flow, Hop
from anabranch.errors import ConfigError
from anabranch.placement.base import Homes, Plan
from anabranch.placement.choice import Exchange
from anabranch.placement.nodes import Nodes
from anabranch.placement.static import StaticPlanner
from anabranch.telemetry.samples import Samples
from anabranch.workload.routing import routing_counts

# One routing weight in fp32, or one int32 slot.
WORD_BYTES = 4


class CallCost(NamedTuple):
    """Forward and backward together, in ms. The parts add up to the total.

    overhead_ms: what measured calls of this exchange took beyond their parts, interpolated over tokens; negative
    where they hide more of the exchange than the model of chunks says.
    """

    plan_ms: float
    weights_ms: float
    dispatch_ms: float
    experts_ms: float
    combine_ms: float
    overhead_ms: float
    total_ms: float


class _Sizes(NamedTuple):
    """Of a plan and a transport: of each hop, what the busiest node moves; the most rows any rank copies."""

    hops: tuple[tuple[Hop, Busiest], ...]
    copied_rows: float


class _Overhead(NamedTuple):
    """By tokens a rank, of one exchange: what calls take beyond their parts, and which part of what could hide does."""

    ms: dict[int, float]
    hidden: dict[int, float]


class CallModel:
    """Prices calls of one layer's shape on one group, by what was measured there.

    Every phase of a call ends together on all ranks, so each counts with its slowest rank:
    1. planning on the host, as measured for the planner;
    2. guests' weights from home to host, and their gradients back;
    3. dispatch: copies into the order of destinations and of slots, and one exchange a hop; its gradient the same
       the other way;
    4. computation until the fullest rank is done; a guest computes as fast as a home;
    5. combine, as dispatch;
    6. what is left of the measured calls at this number of tokens: launches, integer tables, small exchanges.
    With c > 1 chunks there are c exchanges of 1/c of the rows, and (c - 1)/c of the lesser of exchange and computation
    could be hidden behind the other. How much of it is, the measured calls of this exchange tell beside those of the
    same transport in one piece: where ranks lack CPU for both, nothing; each further chunk costs the host anew what
    the smallest call did.

    Prices are rounded to nanoseconds, so that two ways of computing one price are no difference. Raises ConfigError
    naming what is missing where the samples do not cover a planner or an exchange.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.nodes = Nodes.of(samples.node_R)
        self._links = Links(samples.link_ms, self.nodes, samples.one_way_ms, samples.alone_ms)
        self._experts = Computation(samples.expert_ms, samples.expert_alone_ms)
        self._flow: Flow | None = None
        self._sizes: dict[str, _Sizes] = {}
        self._overhead = self._fit_overhead()

    def cost(self, plan: Plan, exchange: Exchange, planner: str) -> CallCost:
        """The cost of one call; `planner` made the plan. The "transformers" exchange has no planning of ours."""
        table = self._overhead.get(exchange)
        if table is None:
            known = ", ".join(f"{name}/{chunks}" for name, chunks in self._overhead)
            raise ConfigError(
                f"{exchange.transport}/{exchange.chunks} was not measured here, only {known}; measure it",
                setting="samples",
            )
        parts = self._parts(plan, exchange)
        tokens = float(plan.counts_RE.sum(axis=1).max()) / self.samples.top_k
        hidden = min(max(_between(table.hidden, tokens), 0.0), 1.0)
        overhead_ms = _between(table.ms, tokens) - hidden * _could_hide(parts, exchange)
        # Overlap can hide an exchange, but no computation.
        overhead_ms = max(overhead_ms, parts.experts_ms - parts.total_ms)
        plan_ms = 0.0 if exchange.transport == TRANSFORMERS else self._plan_ms(planner)
        weights_ms = self._weights_ms(self._flow_of(plan))
        total_ms = plan_ms + weights_ms + parts.total_ms + overhead_ms
        return parts._replace(
            plan_ms=plan_ms, weights_ms=weights_ms, overhead_ms=overhead_ms, total_ms=round(total_ms, 6)
        )

    def lend_ms(self, *, across_nodes: bool) -> float:
        """Time to lend one guest, alone, to a rank of another node or of the home's own, and to return its gradient.

        Between the first two such ranks; 0.0 where there are none.
        """
        node_R = self.nodes.node_R
        apart_RR = node_R[:, None] != node_R
        pairs = np.argwhere(apart_RR if across_nodes else ~apart_RR & ~np.eye(node_R.size, dtype=bool))
        if not len(pairs):
            return 0.0
        lent_RR = np.zeros(apart_RR.shape)
        lent_RR[tuple(pairs[0])] = 1.0
        return self._lend_ms(self._links.busiest(lent_RR), 1.0)

    def rows_worth_ms(self, ms: float) -> int:
        """Rows whose computation takes `ms`, at the rate over all measured sizes."""
        return round(ms / self._experts.rate_ms)

    def _plan_ms(self, planner: str) -> float:
        ms = self.samples.plan_ms.get(planner)
        if ms is None:
            known = ", ".join(self.samples.plan_ms)
            raise ConfigError(f"planner {planner!r} was not measured here, only {known}", setting="samples")
        return ms

    def _flow_of(self, plan: Plan) -> Flow:
        # A review prices one plan with every exchange: their traffic is computed once.
        if self._flow is None or self._flow.plan is not plan:
            self._flow, self._sizes = Flow(plan, self.nodes, self.samples.top_k), {}
        return self._flow

    def _sizes_of(self, plan: Plan, transport: str) -> _Sizes:
        flow = self._flow_of(plan)
        if transport not in self._sizes:
            hops = flow.hops(transport)
            # Each hop gathers what it sends; at last rows are gathered in the order of slots.
            copied_R = plan.rows_R + sum(hop.rows_RR.sum(axis=1) for hop in hops)
            pairs = tuple((hop, self._links.busiest(hop.rows_RR)) for hop in hops)
            self._sizes[transport] = _Sizes(pairs, float(copied_R.max()))
        return self._sizes[transport]

    def _parts(self, plan: Plan, exchange: Exchange) -> CallCost:
        """Dispatch, experts and combine, and these three one after the other."""
        sizes, chunks = self._sizes_of(plan, exchange.transport), exchange.chunks
        copies_ms = 2 * self._copy_ms(sizes.copied_rows * self.samples.row_bytes / chunks)
        dispatch_ms = combine_ms = copies_ms
        for hop, busiest in sizes.hops:
            there_bytes, back_bytes = self._row_bytes(hop)
            # Weights and slots travel forward, the weights' gradients back.
            word_bytes = WORD_BYTES * self.samples.top_k * hop.carries
            for unit_bytes in (there_bytes + 2 * word_bytes, there_bytes + word_bytes):
                dispatch_ms += self._links.ms(busiest, unit_bytes / chunks, hop.links)
            combine_ms += 2 * self._links.ms(busiest, back_bytes / chunks, hop.links)
        experts_ms = self._experts.ms(plan.rows_R / chunks)
        one_ms = dispatch_ms + experts_ms + combine_ms
        return CallCost(
            0.0, 0.0, chunks * dispatch_ms, chunks * experts_ms, chunks * combine_ms, 0.0, chunks * one_ms
        )

    def _row_bytes(self, hop: Hop) -> tuple[int, int]:
        if hop.wired:
            return self.samples.dispatch_row_bytes, self.samples.combine_row_bytes
        return self.samples.row_bytes, self.samples.row_bytes

    def _copy_ms(self, copied_bytes: float) -> float:
        return copied_bytes * 1e-6 * self.samples.copy_ms_per_mb

    def _weights_ms(self, flow: Flow) -> float:
        if not flow.plan.guests:
            return 0.0
        lent_RR = flow.copies_RR
        return self._lend_ms(self._links.busiest(lent_RR), float(lent_RR.sum(axis=1).max()))

    def _lend_ms(self, busiest: Busiest, most_lent: float) -> float:
        """There and back again, gathered at home before and added up there after."""
        expert_bytes = self.samples.expert_bytes
        return 2 * (self._links.ms(busiest, expert_bytes) + self._copy_ms(most_lent * expert_bytes))

    def _fit_overhead(self) -> dict[Exchange, _Overhead]:
        """Of each measured exchange: the measured times less those of the parts, whole micro-batches first."""
        tables: dict[Exchange, _Overhead] = {}
        for sample in sorted(self.samples.call_ms, key=lambda call: (call.chunks, call.tokens)):
            exchange = Exchange(sample.transport, sample.chunks)
            parts = self._parts(self._even_plan(sample.tokens), exchange)
            rest_ms = sample.ms - parts.total_ms
            rest_ms -= 0.0 if sample.transport == TRANSFORMERS else self._plan_ms(StaticPlanner.name)
            table = tables.setdefault(exchange, _Overhead({}, {}))
            hidden = 0.0
            if sample.chunks > 1 and (whole := tables.get(Exchange(sample.transport))):
                # What as many whole calls' host work would take; of what could hide, as much as is missing from it.
                host_ms = _between(whole.ms, sample.tokens) + (sample.chunks - 1) * max(
                    0.0, min(whole.ms.values())
                )
                could_ms = _could_hide(parts, exchange)
                hidden = float(np.clip((host_ms - rest_ms) / could_ms, 0.0, 1.0)) if could_ms > 0 else 0.0
                rest_ms += hidden * could_ms
            table.ms[sample.tokens], table.hidden[sample.tokens] = rest_ms, hidden
        return tables

    def _even_plan(self, tokens: int) -> Plan:
        ranks, experts = self.nodes.ranks, self.samples.experts
        sizes = {"ranks": ranks, "experts": experts, "tokens": tokens, "top_k": self.samples.top_k}
        counts_RE = routing_counts("balanced", **sizes, max_mean=1.0)
        return StaticPlanner().plan(counts_RE, Homes.contiguous(experts, ranks))


def _could_hide(parts: CallCost, exchange: Exchange) -> float:
    """All of the lesser of exchange and computation but one chunk's."""
    lesser_ms = min(parts.dispatch_ms + parts.combine_ms, parts.experts_ms)
    return (exchange.chunks - 1) / exchange.chunks * lesser_ms


def _between(table: Mapping[int, float], tokens: float) -> float:
    """Linear between the sizes of a table in ascending order; outside, the nearest slope goes on.

    Below the smallest size it does not fall under 0, where it is not negative already.
    """
    sizes, values = list(table), list(table.values())
    if len(sizes) == 1 or sizes[0] <= tokens <= sizes[-1]:
        return float(np.interp(tokens, sizes, values))
    low, high = (0, 1) if tokens < sizes[0] else (-2, -1)
    slope = (values[high] - values[low]) / (sizes[high] - sizes[low])
    if low == 0:
        return max(values[0] + slope * (tokens - sizes[0]), min(0.0, values[0]))
    return values[-1] + slope * (tokens - sizes[-1])
