"""Natural skew through the live planners: from popularity to rows, guests and their bytes on every rank.

A micro-batch is drawn from the rows that were counted, and planned by the code that a run plans with. Shape suffixes:
N recorded micro-batches, D draws of one layer, R ranks of one expert-parallel group, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

import numpy as np

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes, IntArray, Plan, Planner, max_over_mean
from anabranch.placement.policy import PLANNERS, make_planner
from anabranch.placement.rehome import rehome
from anabranch.simulator.histogram import FloatArray, Histogram, natural_histogram
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape

# Micro-batches drawn of each layer. With 4096 tokens a rank, max/mean of draws differs by 0.3 to 0.6 %.
DRAWS = 4
# Micro-batches that a planner has seen before the first that counts: `periodic_replication` looks back on 32.
PAST = 32
# The slow loop: all experts at home, where homes were chosen by the load of PAST micro-batches.
REHOME = "rehome"
POLICIES = (*PLANNERS, REHOME)
# Of so many times the rows that are drawn, putting back or not makes no difference: 1 % of their variance.
MANY = 100
# numpy deals from fewer rows than this. Of so many, chance is a ten-thousandth of a hot expert's load anyway.
MOST_DEALT = 10**9


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
    """A planner by name and its settings, as of `make_planner`, which raises ConfigError for those that are wrong.

    Or `rehome`, which no live run can do yet: `static` on homes that follow the load.
    """

    planner: str = "static"
    epsilon: float = 0.05
    slots: int = 2
    min_rows: int = 0

    def build(self) -> Planner:
        name = "static" if self.planner == REHOME else self.planner
        return make_planner(name, epsilon=self.epsilon, slots=self.slots, min_rows=self.min_rows)


@dataclass(frozen=True, eq=False)
class Placed:
    """What one policy makes of one layer: the plans of its drawn micro-batches. moved: experts that got a new home
    before the first of them."""

    layer: int
    plans: tuple[Plan, ...]
    moved: int = 0

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
        (here,) = np.nonzero(histogram.layer_N == layer)
        past, planner = PAST if policy.planner in ("periodic_replication", REHOME) else 0, policy.build()
        drawn: list[IntArray] = []
        for draw in range(-past, draws):
            number, rng = here[draw % here.size], np.random.default_rng((seed, layer, draw % (1 << 32)))
            drawn.append(_drawn(chances_NE[number], float(histogram.rows_N[number]), group, rng))
        own, moved = homes, 0
        if policy.planner == REHOME:
            own, moved = rehome(np.sum(drawn[:past], axis=(0, 1)), homes)
        plans = [planner.plan(counts_RE, own) for counts_RE in drawn]
        placed.append(Placed(layer, tuple(plans[past:]), moved))
    return placed


def _drawn(chances_E: FloatArray, counted: float, group: Group, rng: np.random.Generator) -> IntArray:
    """Rows (R, E) of one micro-batch, dealt from those that were counted.

    Without putting back, so that as many rows as were counted have the loads that were counted: their chance is that
    of one micro-batch already. Where more are needed than were counted, all are dealt as often as it takes.
    """
    rows = group.tokens * group.top_k
    wanted = group.ranks * rows
    if counted > MANY * wanted or (dealt := int(counted) * ceil(wanted / counted)) >= MOST_DEALT:
        return rng.multinomial(rows, chances_E, size=group.ranks)
    left_E = np.diff(np.rint(dealt * np.cumsum(chances_E)), prepend=0).astype(np.int64)
    counts_RE = np.empty((group.ranks, chances_E.size), dtype=np.int64)
    for counts_E in counts_RE:
        counts_E[:] = rng.multivariate_hypergeometric(left_E, rows, method="marginals")
        left_E -= counts_E
    return counts_RE


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
