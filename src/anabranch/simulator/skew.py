"""Natural skew through the live planners: from popularity to rows, guests and their bytes on every rank.

A micro-batch is drawn from the popularity of experts, each source rank's rows multinomially, and planned by the code
that a run plans with. Shape suffixes: D draws of one layer, R ranks of one expert-parallel group, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes, IntArray, Plan, Planner, max_over_mean
from anabranch.placement.policy import make_planner
from anabranch.simulator.histogram import FloatArray, Histogram, natural_histogram
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape

# Micro-batches drawn of each layer. With 4096 tokens a rank, max/mean of draws differs by 0.3 to 0.6 %.
DRAWS = 4
# Micro-batches that a planner has seen before the first that counts: `periodic_replication` looks back on 32.
PAST = 32


class Group(NamedTuple):
    """An expert-parallel group and its work in one micro-batch. tokens: of each rank; top_k: experts a token."""

    ranks: int
    tokens: int
    top_k: int

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout) -> "Group":
        """A rank is `etp` chips; sequence parallelism divides tokens among all. Raises ConfigError without experts."""
        if shape.experts is None:
            raise ConfigError(f"{shape.family} has no experts to be skewed", setting="model")
        tokens = layout.micro_batch * layout.seq_len * layout.etp // (layout.cp * layout.tp)
        return cls(layout.ep, max(1, tokens), shape.experts.top_k)


@dataclass(frozen=True)
class Policy:
    """A planner by name and its settings, as of `make_planner`, which raises ConfigError for those that are wrong."""

    planner: str = "static"
    epsilon: float = 0.05
    slots: int = 2
    min_rows: int = 0

    def build(self) -> Planner:
        return make_planner(self.planner, epsilon=self.epsilon, slots=self.slots, min_rows=self.min_rows)


@dataclass(frozen=True, eq=False)
class Placed:
    """What one policy makes of one layer: the plans of its drawn micro-batches."""

    layer: int
    plans: tuple[Plan, ...]

    @cached_property
    def rows_DR(self) -> IntArray:
        """Rows that each rank computes."""
        return np.array([plan.rows_R for plan in self.plans])

    @property
    def max_mean(self) -> float:
        """Rows of the fullest rank over the mean, mean over draws: how much longer all wait than when balanced."""
        return float(np.mean([max_over_mean(rows_R) for rows_R in self.rows_DR]))

    @property
    def guests(self) -> float:
        """Copies of experts on all ranks, mean over draws."""
        return float(np.mean([plan.guests for plan in self.plans]))

    @property
    def lent(self) -> float:
        """Copies that the busiest rank sends or receives, whichever is more; mean over draws."""
        return float(np.mean([busiest_copies(plan) for plan in self.plans]))


def busiest_copies(plan: Plan) -> int:
    """Copies that one rank sends or receives at most."""
    homes, ranks = plan.homes.rank_E, plan.homes.ranks
    lent_R = np.bincount(homes, weights=plan.guest_RE.sum(axis=0), minlength=ranks)
    return int(max(lent_R.max(), plan.guest_RE.sum(axis=1).max()))


def place(
    histogram: Histogram, group: Group, policy: Policy, *, draws: int = DRAWS, seed: int = 0
) -> list[Placed]:
    """One `Placed` a layer of the histogram, whose experts are the model's. Equal arguments give equal plans.

    The draws of a layer take its micro-batches in turn. All policies see the same draws.
    """
    homes = Homes.contiguous(histogram.experts, group.ranks)
    if group.top_k > histogram.experts or group.tokens < 1:
        raise ConfigError(
            f"{group.tokens} tokens cannot pick {group.top_k} of {histogram.experts} experts each",
            setting="top_k",
        )
    chances_NE = histogram.drawn_from(group.top_k)
    placed: list[Placed] = []
    for layer in histogram.layers:
        here_NE, planner = chances_NE[histogram.layer_N == layer], policy.build()
        past = PAST if policy.planner == "periodic_replication" else 0
        plans = [
            planner.plan(_drawn(here_NE, group, (seed, layer, draw % (1 << 32))), homes)
            for draw in range(-past, draws)
        ]
        placed.append(Placed(layer, tuple(plans[past:])))
    return placed


def _drawn(chances_NE: FloatArray, group: Group, seed: tuple[int, int, int]) -> IntArray:
    """Rows (R, E) of one micro-batch."""
    rng, chances_E = np.random.default_rng(seed), chances_NE[seed[2] % len(chances_NE)]
    return rng.multinomial(group.tokens * group.top_k, chances_E, size=group.ranks)


def rank_skew(
    degrees: Iterable[int],
    *,
    experts: int,
    top_k: int,
    tokens: int,
    policy: Policy | None = None,
    histogram: Histogram | None = None,
) -> dict[int, float]:
    """By expert-parallel degree, rows of the fullest rank over the mean, averaged over layers and draws.

    tokens: of a rank in one micro-batch. policy: static where none is given. histogram: the shipped natural traces
    where none is given; resampled where it has another number of experts (`Histogram.resampled`). 1.0 for one rank.
    """
    popularity = (histogram or natural_histogram(experts)).resampled(experts)
    policy = policy or Policy()
    return {
        ranks: mean_skew(place(popularity, Group(ranks, tokens, top_k), policy)) if ranks > 1 else 1.0
        for ranks in degrees
    }


def mean_skew(placed: Sequence[Placed]) -> float:
    """Max/mean, the mean over layers: by so much longer does a step spend in experts. 1.0 where nothing is placed."""
    return float(np.mean([layer.max_mean for layer in placed])) if placed else 1.0
