"""`anabranch bench skew`, one rank: what natural skew costs a step, measured and predicted.

Measured: steps of a whole model with the routing of a workload, under each policy, and with balanced routing; all of a
round one after the other. Predicted: by the simulator, from the histogram of other micro-batches of the workload, at
the prices that the ranks calibrated now and then in between. Shape suffixes: L layers, R ranks, E experts.
"""

from typing import Any

import numpy as np
from torch import Tensor

from anabranch.cli.bench_cluster import ClusterRank, measure_cells
from anabranch.cli.cluster_cases import PAST
from anabranch.cli.cluster_rows import Policy as Choice
from anabranch.cli.cluster_settings import ClusterBench
from anabranch.costs.call import CallModel
from anabranch.experts.adaptive import AdaptiveExperts, Observation
from anabranch.placement.base import max_over_mean
from anabranch.placement.choice import Exchange
from anabranch.placement.policy import make_planner
from anabranch.simulator.histogram import Histogram, histogram_of
from anabranch.simulator.skew import Group, Placed, Policy, mean_skew, place
from anabranch.simulator.slowdown import LivePrices
from anabranch.transport.base import Wires

POLICIES = ("static", "least_loaded", "exact", "bounded")
# Rounds between two calibrations. A machine that others use gets slower and faster within a cell; one calibration, of
# seconds, would price what is measured over minutes by one moment.
CALIBRATE_EVERY = 6


def bench_skew_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank. Rank 0 puts down the rows of each workload as they are measured."""
    measure_cells(ClusterBench.from_dict(settings), SkewRank)
    return {}


def _points(row: dict[str, Any]) -> float:
    return round(100 * (row["predicted_throughput"] - row["throughput"]), 2)


def _priced(seen: list[Observation], prices: list[LivePrices]) -> dict[str, float]:
    """A step at the plans that were made: what of an error is the prices', not the histogram's."""
    plans, planner = tuple(observed.plan for observed in seen), seen[0].choice.planner
    steps_s = [price.step_s([Placed(0, plans)], planner) for price in prices]
    return {"priced_ms": round(1e3 * float(np.median(steps_s)), 1)}


class SkewRank(ClusterRank):
    """The models, carriers and prices of the cluster benchmark, for policies over one exchange."""

    def rows(self, workload: str) -> list[dict[str, Any]]:
        """One row a policy."""
        exchange = Exchange(self.carriers["none"].exchanges[-1].transport)
        choices = [Choice(name, exchange) for name in POLICIES]
        layers = {choice.name: self._layers(choice, workload) for choice in choices}
        even = self._layers(Choice("static", exchange), workload)
        times_ms: dict[str, list[float]] = {name: [] for name in ("balanced", *POLICIES)}
        seen: dict[str, list[Observation]] = {name: [] for name in times_ms}
        prices: list[LivePrices] = []
        for turn in range(-1, self.bench.rounds):  # the first round warms up
            if turn >= 0 and turn % CALIBRATE_EVERY == 0:
                prices.append(self._prices(exchange))
            routed = self._tensors(self.cases.ids(workload, PAST + turn))
            for name in np.roll(list(times_ms), turn).tolist():
                balanced = name == "balanced"
                ids = self._even(self.cases.tokens) if balanced else routed
                step_ms, observed = self._timed(even if balanced else layers[name], ids)
                if turn >= 0:
                    times_ms[name].append(step_ms)
                    seen[name] += observed
        predicted = self._predicted(workload, prices)
        about = {"workload": workload, "transport": exchange.transport}
        rows = [
            about | self._row(name, times_ms, seen[name]) | predicted[name] | _priced(seen[name], prices)
            for name in POLICIES
        ]
        return [row | {"error_points": _points(row)} for row in rows]

    def _prices(self, exchange: Exchange) -> LivePrices:
        """Measured now, by the probe behind `auto`."""
        planners = {
            name: make_planner(name, epsilon=self.bench.epsilon, slots=self.bench.slots) for name in POLICIES
        }
        samples = self.probe().samples(self.carriers["none"].transports, [exchange], planners, Wires())
        rest_ms = self._median(self.ours.without_experts, self.cases.tokens)
        return LivePrices(CallModel(samples), rest_ms, self.ours.layers, exchange)

    def _timed(self, layers: list[AdaptiveExperts], ids: list[Tensor]) -> tuple[float, list[Observation]]:
        observed: list[Observation] = []
        for layer in layers:
            layer.observers[:] = [observed.append]
        self.ours.carry(layers)
        return self.ours.step(ids).step_ms, observed

    def _predicted(self, workload: str, prices: list[LivePrices]) -> dict[str, dict[str, float]]:
        """Of each policy, from the histogram alone; the median of what each calibration says."""
        histogram = self._histogram(workload)
        group = Group(self.ranks, self.cases.tokens, self.cases.top_k)
        balanced_s, found = [price.balanced_s(group) for price in prices], dict[str, dict[str, float]]()
        for name in POLICIES:
            placed = place(
                histogram, group, Policy(name, self.bench.epsilon, self.bench.slots), draws=PAST - 1
            )
            step_s = [price.step_s(placed, name) for price in prices]
            found[name] = {
                "predicted_max_mean": round(mean_skew(placed), 3),
                "predicted_guests": round(float(np.mean([layer.guests for layer in placed])), 2),
                "predicted_ms": round(1e3 * float(np.median(step_s)), 1),
                "predicted_balanced_ms": round(1e3 * float(np.median(balanced_s)), 1),
                "predicted_throughput": round(float(np.median(np.divide(balanced_s, step_s))), 4),
            }
        return found

    def _histogram(self, workload: str) -> Histogram:
        """Rows of each expert in each layer of micro-batches before those that are measured."""
        past = [self.cases.counts(self.cases.ids(workload, step)) for step in range(PAST - 1)]
        counts_NE = np.array([counts_RE.sum(axis=0) for layers in past for counts_RE in layers])
        return histogram_of(counts_NE, np.tile(np.arange(self.cases.layers), len(past)), workload)

    def _row(self, name: str, times_ms: dict[str, list[float]], seen: list[Observation]) -> dict[str, Any]:
        mine, balanced = np.array(times_ms[name]), np.array(times_ms["balanced"])
        return {
            "policy": name,
            "max_mean": round(float(np.mean([max_over_mean(o.plan.rows_R) for o in seen])), 3),
            "guests": round(sum(o.plan.guests for o in seen) / len(seen), 2),
            "step_ms_median": round(float(np.median(mine)), 1),
            "step_ms_rounds": mine.round(2).tolist(),
            "balanced_ms_median": round(float(np.median(balanced)), 1),
            "throughput": round(float(np.median(balanced / mine)), 4),
        }
