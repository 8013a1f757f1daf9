"""`anabranch bench cluster`, one rank: a whole model's step under every policy and workload, on shaped links.

All policies share one model's weights, the inputs and the routing of a workload, and are measured interleaved in
one run. transformers' own `all_to_all` runs in a second model with the same weights. Predicted times are those of the
cost model that `auto` chooses by, calibrated anew for each workload: the step without experts plus every layer's
priced call.

Shape suffixes: S tokens of a rank, K experts a token, R ranks, E experts.
"""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import anabranch
from anabranch.cli.cluster_cases import CHANGES, CHANGING, NATURAL, PAST, RAGGED
from anabranch.cli.cluster_contest import Record, next_round
from anabranch.cli.cluster_model import AdaptiveModel, StepModel
from anabranch.cli.cluster_rows import AUTO, IDEAL, TRANSFORMERS, Policy, Reporter, Run, policies
from anabranch.cli.cluster_settings import ClusterBench
from anabranch.cli.steal import Steal
from anabranch.costs.call import CallModel
from anabranch.costs.prices import CalibratedPrices
from anabranch.experts.adaptive import AdaptiveExperts, Observation
from anabranch.integrations.carriers import Carriers
from anabranch.integrations.measure import LayerShape, Probe
from anabranch.integrations.trial import LayerTrial
from anabranch.placement.base import Homes, IntArray
from anabranch.placement.cheapest import CheapestChoice, candidate_planners
from anabranch.placement.choice import Chooser, Exchange, FixedChoice
from anabranch.placement.policy import make_planner
from anabranch.placement.static import StaticPlanner
from anabranch.placement.trials import Experience
from anabranch.telemetry.samples import CallSample, Samples
from anabranch.transport.base import Wires

# Where a hypervisor takes more than this part of all CPU time, a round is measured again, and so are prices and trials:
# them at most so many times.
STOLEN = 0.02
ATTEMPTS = 4


def bench_cluster_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank. Returns {"explained": [...]}; rows are put down by rank 0, cell by cell."""
    bench = ClusterBench.from_dict(settings)
    measured = measure_cells(bench, ClusterRank)
    return {"explained": measured.explained() if bench.explain else []}


class Prepared(NamedTuple):
    """Carriers of every policy by prices of now. tried_ms: what trials of `auto` took. stolen: of that time, the part
    that a hypervisor took."""

    layers: dict[Policy, list[AdaptiveExperts]]
    tried_ms: float
    stolen: float


Rank = TypeVar("Rank", bound="ClusterRank")


def measure_cells(bench: ClusterBench, rank: type[Rank]) -> Rank:
    """Join the ranks and measure every workload, by `rank.rows`; rank 0 puts the rows of each down."""
    dist.init_process_group("gloo")
    anabranch.enable(planner=AUTO, epsilon=bench.epsilon, slots=bench.slots, cache=bench.folder)
    measured = rank(bench)
    for number, workload in enumerate(bench.workloads):
        rows = measured.rows(workload)
        if dist.get_rank() == 0:
            _put_down(rows, Path(bench.folder) / f"cell-{number:03}.json")
    return measured


def _records(runs: dict[Policy, Run]) -> dict[Policy, Record]:
    return {policy: Record(run.step_ms, run.program) for policy, run in runs.items()}


def _put_down(rows: list[dict[str, Any]], file: Path) -> None:
    """Whole or not at all: the launcher takes what it sees."""
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(rows))
    written.replace(file)


class ClusterRank:
    """One rank of the benchmark: two models, and the carriers and prices of every policy."""

    def __init__(self, bench: ClusterBench) -> None:
        self.bench, self.cases = bench, bench.cases
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.homes = Homes.contiguous(bench.cases.experts, self.ranks)
        self.theirs = StepModel(bench.model, self.ranks, "all_to_all")
        self.ours = AdaptiveModel(bench.model, self.ranks)
        shared = self.ours.adaptive[0].carriers
        coarse = Carriers(shared.domain, shared.exchanges, Wires("int8", "int8"))
        self.carriers = {"none": shared, "int8": coarse}
        self.policies = policies(shared.exchanges)
        self.steal = Steal()
        self.hidden: int = self.ours.model.config.hidden_size
        # Rows are fp32: 4 bytes a number.
        self.reporter = Reporter(bench.cases, self.homes, shared.domain.nodes, 4 * self.hidden, bench.cpu)

    def rows(self, workload: str) -> list[dict[str, Any]]:
        """One row a policy, after interleaved rounds in which `next_round` says who takes part.

        Rounds of which a hypervisor took too much are dropped, at most as many as may be kept.
        """
        layers, tried_ms, before = self._prepared(workload)
        runs = {policy: Run() for policy in self.policies}
        measured: list[list[IntArray]] = []
        dropped, stolen = 0, [before]
        while taking_part := next_round(_records(runs), self.bench.rounds):
            counts = self._round(workload, len(measured), taking_part, layers, runs)
            part = self._stolen()
            if part > STOLEN and dropped < self.bench.rounds:
                dropped += 1
                for policy in taking_part:
                    runs[policy].forget_last()
                continue
            measured.append(counts)
            stolen.append(part)
        about = {"rounds_dropped": dropped, "stolen_percent": round(100 * max(stolen), 2)}
        rows = [self.reporter.row(workload, policy, runs, measured) for policy in self.policies]
        return [row | about | {"trials_ms": tried_ms if row["policy"] == AUTO else 0.0} for row in rows]

    def _prepared(self, workload: str) -> Prepared:
        """Prices are measured, and `auto` tries; anew where a hypervisor took too much."""
        self._stolen()
        for _ in range(ATTEMPTS):
            self._calibrate(workload)
            layers = {policy: self._layers(policy, workload) for policy in self.policies}
            tried_ms = self._try_before(layers, workload)
            if (part := self._stolen()) <= STOLEN:
                break
        return Prepared(layers, tried_ms, part)

    def _round(
        self,
        workload: str,
        turn: int,
        taking_part: list[Policy],
        layers: dict[Policy, list[AdaptiveExperts]],
        runs: dict[Policy, Run],
    ) -> list[IntArray]:
        """Everybody once, each time from another one on. Returns the rows routed, layer by layer."""
        routed = self.cases.ids(workload, PAST + turn)
        ids, counts, even = self._tensors(routed), self.cases.counts(routed), self._even(self.cases.tokens)
        first = turn % len(taking_part)
        for policy in taking_part[first:] + taking_part[:first]:
            self._once(policy, layers[policy], even if policy.name == IDEAL else ids, counts, runs[policy])
        return counts

    def _stolen(self) -> float:
        """The part of all CPU time that was stolen since the last call. Equal on all ranks."""
        most = torch.tensor([self.steal.part()], dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def _calibrate(self, workload: str) -> None:
        """Measures anew what `auto` chooses by and steps are predicted by, as a training that begins now would: the
        cells of a lab take an hour, in which a host that others use gets slower and faster."""
        carriers, tokens = self.carriers["none"], self.cases.tokens
        samples = self.probe().samples(carriers.transports, carriers.exchanges, carriers.planners(), Wires())
        self.prices = CalibratedPrices(samples)
        self.sizes = [tokens // 2, tokens, 2 * tokens] if workload == RAGGED else [tokens]
        self.rest_ms = {n: self._median(self.ours.without_experts, n) for n in self.sizes}
        self.model = CallModel(self._with_transformers(samples))

    def _try_before(self, layers: dict[Policy, list[AdaptiveExperts]], workload: str) -> float:
        """Lets `auto` try what leads, in the micro-batches before the first measured one: ms of all layers.

        Training does so now and then at its beginning; what is measured is the choice that it keeps.
        """
        (mine,) = (found for policy, found in layers.items() if policy.name == AUTO)
        for layer in mine:
            layer.trial_of = LayerTrial
        self.ours.carry(mine)
        for step in range(PAST - (CHANGES if workload in CHANGING else 1), PAST):
            self.ours.step(self._tensors(self.cases.ids(workload, step)))
        for layer in mine:
            layer.trial_of = None
        chooser = mine[0].chooser
        assert isinstance(chooser, CheapestChoice)
        return round(chooser.experience.spent_ms, 1)

    def explained(self) -> list[dict[str, Any]]:
        """One layer under natural routing: everything `auto` chooses from, cheapest first."""
        probe, carriers, routed = self.probe(), self.carriers["none"], self.cases.ids(NATURAL, PAST)
        ids_SK = self._tensors(routed)[0]
        chooser = self._chooser(Policy(AUTO, None))
        assert isinstance(chooser, CheapestChoice)
        chooser.choose(self.cases.counts(routed)[0], self.homes)
        return [
            {
                "planner": c.planner,
                "exchange": f"{c.exchange.transport}/{c.exchange.chunks}",
                "guests": c.guests,
                "predicted_ms": round(c.predicted_ms, 2),
                "measured_ms": round(
                    probe.layer(
                        FixedChoice(chooser.planners[c.planner], c.exchange), carriers.transports, ids_SK
                    ),
                    2,
                ),
            }
            for c in sorted(chooser.review, key=lambda candidate: candidate.predicted_ms)
        ]

    def probe(self) -> Probe:
        """Of the first layer, between steps."""
        adaptive = self.ours.adaptive[0]
        # Between steps the shares of the experts lie there unsharded, as distributed tensors of the group.
        own: list[Any] = [adaptive.experts._parameters[name] for name in adaptive.names]
        home = [p.to_local().detach() if isinstance(p, DTensor) else p.detach() for p in own]
        shape = LayerShape(self.homes, self.cases.tokens, self.hidden, self.cases.top_k, home[0].dtype)
        return Probe(self.carriers["none"].domain, shape, home, adaptive.forward)

    def _once(
        self, policy: Policy, layers: list[AdaptiveExperts], ids: list[Tensor], counts: list[Any], run: Run
    ) -> None:
        if policy.name == TRANSFORMERS:
            run.timed.append(self.theirs.step(ids))
            exchange = Exchange(TRANSFORMERS)
            plans = [StaticPlanner().plan(counts_RE, self.homes) for counts_RE in counts]
            calls_ms = [self.model.cost(plan, exchange, "static").total_ms for plan in plans]
        else:
            seen: list[Observation] = []
            for layer in layers:
                layer.observers[:] = [seen.append]
            self.ours.carry(layers)
            run.timed.append(self.ours.step(ids))
            run.seen.append(seen)
            choices = [o.choice for o in seen]
            calls_ms = [self._priced(policy, c.plan, c.exchange, c.planner) for c in choices]
        tokens = max(int(ids_SK.shape[0]) for ids_SK in ids)
        most = max(int(counts_RE.sum(axis=1).max()) // self.cases.top_k for counts_RE in counts)
        rest_ms = np.interp(
            tokens if policy.name == IDEAL else most, self.sizes, [self.rest_ms[n] for n in self.sizes]
        )
        run.predicted_ms.append(float(rest_ms) + sum(calls_ms))

    def _priced(self, policy: Policy, plan: Any, exchange: Exchange, planner: str) -> float:
        # Codecs are not calibrated here: a lossy row has no prediction.
        return self.model.cost(plan, exchange, planner).total_ms if policy.codec == "none" else float("nan")

    def _layers(self, policy: Policy, workload: str) -> list[AdaptiveExperts]:
        """A carrier for each layer, with a past where its planner looks back."""
        if policy.name == TRANSFORMERS:
            return []
        experience = Experience()
        choosers = [self._chooser(policy, experience) for _ in self.ours.adaptive]
        if policy.name == "periodic_replication":
            for step in range(PAST):
                counts = self.cases.counts(self.cases.ids(workload, step))
                for chooser, counts_RE in zip(choosers, counts, strict=True):
                    chooser.choose(counts_RE, self.homes)
        transports = self.carriers[policy.codec].transports
        return [
            AdaptiveExperts(adaptive.group, self.homes, chooser, transports, adaptive.forward)
            for adaptive, chooser in zip(self.ours.adaptive, choosers, strict=True)
        ]

    def _chooser(self, policy: Policy, experience: Experience | None = None) -> Chooser:
        bench, carriers = self.bench, self.carriers["none"]
        if policy.exchange is None:
            nodes = carriers.domain.nodes
            planners = candidate_planners(self.prices, nodes, epsilon=bench.epsilon, slots=bench.slots)
            return CheapestChoice(planners, carriers.exchanges, self.prices, experience=experience)
        planner = make_planner(policy.name, epsilon=bench.epsilon, slots=bench.slots)
        return FixedChoice(planner, policy.exchange)

    def _tensors(self, ids: list[list[np.ndarray]]) -> list[Tensor]:
        return [torch.from_numpy(by_rank[self.rank]) for by_rank in ids]

    def _even(self, tokens: int) -> list[Tensor]:
        return self._tensors(replace(self.cases, tokens=tokens).ids("W0", 0))

    def _median(self, step: Any, tokens: int) -> float:
        ids = self._even(tokens)
        step(ids)
        return statistics.median(step(ids).step_ms for _ in range(3))

    def _with_transformers(self, samples: Samples) -> Samples:
        """Their all_to_all as one more exchange: what a layer of theirs adds to the rest of the model."""
        calls = tuple(
            CallSample(
                TRANSFORMERS, 1, n, (self._median(self.theirs.step, n) - self.rest_ms[n]) / self.ours.layers
            )
            for n in self.sizes
        )
        return replace(samples, call_ms=(*samples.call_ms, *calls))
