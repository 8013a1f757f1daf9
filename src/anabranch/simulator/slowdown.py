"""What natural skew costs a training step: balanced time over natural time, from a histogram alone.

Computation of experts and the exchange of their rows end with the busiest rank; the rest of a step does not change.
Two kinds of prices: `PublishedPrices`, for hardware that is not at hand, and `LivePrices`, of ranks measured here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from anabranch.costs.call import CallModel
from anabranch.costs.training.calibration import Calibration
from anabranch.costs.training.columns import columns_of
from anabranch.costs.training.components import components
from anabranch.costs.training.efficiency import HOST, step_of
from anabranch.costs.training.setup import Setup
from anabranch.placement.base import Homes
from anabranch.placement.choice import Exchange
from anabranch.placement.static import StaticPlanner
from anabranch.simulator.histogram import Histogram
from anabranch.simulator.skew import Group, Placed, Policy, mean_skew, place
from anabranch.workload.routing import routing_counts

# A guest's weights travel to its host once a micro-batch and their gradients back, both in the step's precision.
LENDINGS = 2
WEIGHT_BYTES = 2.0


class Slowdown(NamedTuple):
    """Of one policy. seconds of a step, with this popularity and with all experts equally popular at home."""

    policy: str
    step_s: float
    balanced_s: float

    @property
    def throughput(self) -> float:
        """Natural over balanced."""
        return self.balanced_s / self.step_s


@dataclass(frozen=True)
class PublishedPrices:
    """A setup on hardware of the catalog, its components at the efficiencies of published runs."""

    setup: Setup
    calibration: Calibration

    def balanced_s(self, group: Group) -> float:
        return self._balanced_s

    def step_s(self, placed: Sequence[Placed], planner: str) -> float:
        """Layers of `placed` stand for the model's in equal parts."""
        return self._balanced_s * self._formula_s(placed) / self._formula_s()

    def stretch(self, placed: Sequence[Placed]) -> float:
        """A step without the pipeline's idling over the sum of its `parts_s`: what the host and the residual of
        setups like this one make of them."""
        parts_s = sum(self.parts_s(placed).values())
        return self.step_s(placed, "") / (1.0 + self.bubble) / parts_s

    def parts_s(self, placed: Sequence[Placed] = ()) -> dict[str, float]:
        """Seconds of the device's components in a step, balanced where nothing is placed. Guests travel as the
        exchange does, of which they are a part."""
        columns = columns_of([replace(self.setup, skew=mean_skew(placed))])
        parts = self.calibration.efficiency.parts_s(columns)
        seconds = {name: float(column[0]) for name, column in parts.items() if name not in HOST}
        seconds["exchange"] += self.guest_s * sum(layer.lent for layer in placed) / max(1, len(placed))
        return seconds

    def waiting_s(self, placed: Sequence[Placed]) -> float:
        """Of a step, that the mean rank waits while the fullest one computes its experts."""
        parts = self.parts_s()
        return (mean_skew(placed) - 1.0) * (parts["experts"] + parts["rows"]) * self.stretch(placed)

    @property
    def expert_bytes(self) -> float:
        """Weights of one guest on one chip."""
        return self.setup.shape.expert_params / self.setup.layout.etp * WEIGHT_BYTES

    @cached_property
    def guest_s(self) -> float:
        """Of lending one guest in every layer and micro-batch of a step, on the link that the group spans."""
        shape, layout = self.setup.shape, self.setup.layout
        sent = self.expert_bytes * LENDINGS
        layers = shape.moe_layers + (shape.mtp if shape.experts else 0)
        rate = self.setup.cluster.link(layout.ep * layout.etp).gb_per_s.mid * 1e9
        seconds = sent * layout.micro_batches * layers / layout.pp / rate
        return seconds * self.calibration.efficiency.factors["exchange"]

    @property
    def guest_rows(self) -> int:
        """Rows whose computation takes as long as lending one guest: fewer are not worth it."""
        group, parts = Group.of(self.setup.shape, self.setup.layout), self.parts_s()
        return round(self.guest_s / (parts["experts"] + parts["rows"]) * group.tokens * group.top_k)

    @cached_property
    def bubble(self) -> float:
        """The pipeline's idling over the rest of the step."""
        parts = components(columns_of([self.setup]))
        return float(parts.bubble[0]) * self.calibration.efficiency.factors["bubble"]

    @cached_property
    def _balanced_s(self) -> float:
        """With the residual of setups like this, which is one factor on the whole step."""
        return self.calibration.predict([replace(self.setup, skew=1.0)])[0].step_s

    def _formula_s(self, placed: Sequence[Placed] = ()) -> float:
        host = self.calibration.efficiency.parts_s(columns_of([self.setup]))
        parts = {name: np.array([s]) for name, s in self.parts_s(placed).items()}
        return float(step_of({**parts, **{name: host[name] for name in HOST}}, np.array([self.bubble]))[0])


@dataclass(frozen=True)
class LivePrices:
    """Measured on ranks at hand: calls of one layer by `CallModel`, and the rest of the step.

    rest_ms: of a step whose experts do nothing. layers: with experts.
    """

    calls: CallModel
    rest_ms: float
    layers: int
    exchange: Exchange

    def balanced_s(self, group: Group) -> float:
        return self.step_s([balanced(group, self.calls.samples.experts)], "static")

    def step_s(self, placed: Sequence[Placed], planner: str) -> float:
        """Layers of `placed` stand for the model's in equal parts. planner: by the name it was timed under."""
        layers_ms = [
            np.mean([self.calls.cost(plan, self.exchange, planner).total_ms for plan in layer.plans])
            for layer in placed
        ]
        return (self.rest_ms + self.layers * float(np.mean(layers_ms))) / 1e3


def balanced(group: Group, experts: int) -> Placed:
    """A layer whose experts are equally popular, each at home."""
    sizes = {"ranks": group.ranks, "experts": experts, "tokens": group.tokens, "top_k": group.top_k}
    counts_RE = routing_counts("W0", **sizes, max_mean=1.0)
    return Placed(0, (StaticPlanner().plan(counts_RE, Homes.contiguous(experts, group.ranks)),))


def slowdowns(
    policies: Sequence[Policy], histogram: Histogram, group: Group, prices: PublishedPrices | LivePrices
) -> list[Slowdown]:
    """One for each policy, in their order, over the same drawn micro-batches."""
    balanced_s = prices.balanced_s(group)
    return [
        Slowdown(policy.planner, prices.step_s(place(histogram, group, policy), policy.planner), balanced_s)
        for policy in policies
    ]


def ranking(times: Sequence[Slowdown]) -> list[str]:
    """Policies by their step, the fastest first."""
    return [time.policy for time in sorted(times, key=lambda time: time.step_s)]
