"""`anabranch bench cluster`, one rank: a whole model's step under every policy and workload, on shaped links.

All policies share one model's weights, the inputs and the routing of a workload, and are measured interleaved in
one run. transformers' own `all_to_all` runs in a second model with the same weights. Predicted times are those of the
cost model that `auto` chooses by: the step without experts, measured once, plus every layer's priced call.

Shape suffixes: S tokens of a rank, K experts a token, R ranks, E experts.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import anabranch
from anabranch.cli.cluster_cases import PAST, ClusterCases
from anabranch.cli.cluster_model import AdaptiveModel, StepModel, Timed
from anabranch.costs.call import CallModel
from anabranch.experts.adaptive import AdaptiveExperts, Observation
from anabranch.integrations.carriers import Carriers
from anabranch.placement.base import Homes, max_over_mean
from anabranch.placement.cheapest import CheapestChoice, candidate_planners
from anabranch.placement.choice import Chooser, Exchange, FixedChoice
from anabranch.placement.policy import make_planner
from anabranch.placement.static import StaticPlanner
from anabranch.telemetry.samples import CallSample, Samples
from anabranch.transport.base import Wires

TRANSFORMERS, IDEAL, AUTO = "transformers", "ideal", "auto"


@dataclass(frozen=True)
class ClusterBench:
    """What one launch measures. folder: the model's initial weights. cpu: each rank's quota, None without."""

    folder: str
    cases: ClusterCases
    workloads: list[str]
    rounds: int
    slots: int
    epsilon: float
    cache: str
    cpu: float | None = None

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "ClusterBench":
        return cls(**{**settings, "cases": ClusterCases(**settings["cases"])})


class Policy(NamedTuple):
    """name: the planner, or one of transformers, auto, ideal. exchange: None where it is chosen."""

    name: str
    exchange: Exchange | None
    codec: str = "none"


@dataclass
class Run:
    """What one policy did on one workload, round by round."""

    timed: list[Timed] = field(default_factory=list)
    seen: list[list[Observation]] = field(default_factory=list)
    predicted_ms: list[float] = field(default_factory=list)


def policies(exchanges: Sequence[Exchange]) -> list[Policy]:
    """Everything compared: fixed planners over the exchange with the fewest rows, two of them over plain
    all_to_all and in two chunks, one with int8 rows, our choice, and the ideal."""
    best = next(e.transport for e in reversed(exchanges))
    plain, single, chunked = Exchange("all_to_all"), Exchange(best), Exchange(best, 2)
    return [
        Policy(TRANSFORMERS, plain),
        Policy("static", plain),
        Policy("static", single),
        Policy("static", chunked),
        Policy("periodic_replication", single),
        Policy("least_loaded", single),
        Policy("exact", single),
        Policy("bounded", plain),
        Policy("bounded", single),
        Policy("bounded", chunked),
        Policy("bounded", single, "int8"),
        Policy(AUTO, None),
        Policy(IDEAL, None),
    ]


def bench_cluster_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank. Returns {"rows": [...], "samples": {...}}, the same on every rank."""
    bench = ClusterBench.from_dict(settings)
    dist.init_process_group("gloo")
    anabranch.enable(planner=AUTO, epsilon=bench.epsilon, slots=bench.slots, cache=bench.cache)
    measured = ClusterRank(bench)
    rows = [row for workload in bench.workloads for row in measured.rows(workload)]
    return {"rows": rows, "samples": measured.samples.to_json()}


class ClusterRank:
    """One rank of the benchmark: two models, and the carriers and prices of every policy."""

    def __init__(self, bench: ClusterBench) -> None:
        self.bench, self.cases = bench, bench.cases
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.homes = Homes.contiguous(bench.cases.experts, self.ranks)
        self.theirs = StepModel(bench.folder, self.ranks, "all_to_all")
        self.ours = AdaptiveModel(bench.folder, self.ranks)
        self.sizes = sorted({bench.cases.tokens // 2, bench.cases.tokens, 2 * bench.cases.tokens})
        # The first step measures what `auto` chooses by, the way a training run does.
        self.ours.step(self._even(bench.cases.tokens))
        first = self.ours.adaptive[0]
        self.carriers = {"none": first.carriers}
        self.carriers["int8"] = Carriers(
            first.carriers.domain, first.carriers.exchanges, Wires("int8", "int8")
        )
        chooser = first.layer.chooser if first.layer else None
        assert isinstance(chooser, CheapestChoice)
        self.prices = chooser.prices
        self.policies = policies(first.carriers.exchanges)
        self.rest_ms = {n: self._median(self.ours.without_experts, n) for n in self.sizes}
        self.samples = self._with_transformers(chooser.prices.model.samples)  # type: ignore[attr-defined]
        self.model = CallModel(self.samples)

    def rows(self, workload: str) -> list[dict[str, Any]]:
        """One row a policy, after `rounds` interleaved rounds and one to warm up."""
        layers = {policy: self._layers(policy, workload) for policy in self.policies}
        runs = {policy: Run() for policy in self.policies}
        for turn in range(self.bench.rounds + 1):
            step = PAST - 1 + turn
            ids = self._tensors(self.cases.ids(workload, step))
            even = self._even(self.cases.tokens)
            counts = self.cases.counts(workload, step)
            first = turn % len(self.policies)
            for policy in self.policies[first:] + self.policies[:first]:
                run = Run() if turn == 0 else runs[policy]
                self._once(policy, layers[policy], even if policy.name == IDEAL else ids, counts, run)
        return [self._row(workload, policy, runs) for policy in self.policies]

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
        choosers = [self._chooser(policy) for _ in self.ours.adaptive]
        if policy.name == "periodic_replication":
            for step in range(PAST):
                for chooser, counts_RE in zip(choosers, self.cases.counts(workload, step), strict=True):
                    chooser.choose(counts_RE, self.homes)
        transports = self.carriers[policy.codec].transports
        return [
            AdaptiveExperts(adaptive.group, self.homes, chooser, transports, adaptive.forward)
            for adaptive, chooser in zip(self.ours.adaptive, choosers, strict=True)
        ]

    def _chooser(self, policy: Policy) -> Chooser:
        bench, carriers = self.bench, self.carriers["none"]
        if policy.exchange is None:
            nodes = carriers.domain.nodes
            planners = candidate_planners(self.prices, nodes, epsilon=bench.epsilon, slots=bench.slots)
            return CheapestChoice(planners, carriers.exchanges, self.prices)
        planner = make_planner(policy.name, epsilon=bench.epsilon, slots=bench.slots)
        return FixedChoice(planner, policy.exchange)

    def _tensors(self, ids: list[list[np.ndarray]]) -> list[Tensor]:
        return [torch.from_numpy(by_rank[self.rank]) for by_rank in ids]

    def _even(self, tokens: int) -> list[Tensor]:
        cases = (
            self.cases
            if tokens == self.cases.tokens
            else ClusterCases(**{**vars(self.cases), "tokens": tokens})
        )
        return self._tensors(cases.ids("W0", 0))

    def _median(self, step: Any, tokens: int) -> float:
        ids = self._even(tokens)
        step(ids)
        return statistics.median(step(ids).step_ms for _ in range(5))

    def _with_transformers(self, samples: Samples) -> Samples:
        """Their all_to_all as one more exchange: what a layer of theirs adds to the rest of the model."""
        calls = tuple(
            CallSample(
                TRANSFORMERS, 1, n, (self._median(self.theirs.step, n) - self.rest_ms[n]) / self.ours.layers
            )
            for n in self.sizes
        )
        return Samples(**{**vars(samples), "call_ms": (*samples.call_ms, *calls)})

    def _row(self, workload: str, policy: Policy, runs: dict[Policy, Run]) -> dict[str, Any]:
        run = runs[policy]
        mine = np.array([t.step_ms for t in run.timed])
        # Ratios within a round, where the machine's other load hit both sides alike, then their median.
        ratio = {
            p.name: np.array([t.step_ms for t in runs[p].timed]) / mine
            for p in runs
            if p.name in (TRANSFORMERS, IDEAL)
        }
        low, high = np.percentile(mine, [25, 75])
        rounds = range(PAST, PAST + self.bench.rounds)
        before = [self.cases.max_mean_of(self.cases.counts(workload, step)) for step in rounds]
        quota = self.bench.cpu or 1.0
        waiting_ms = np.array([[t.step_ms - 1e3 * cpu_s / quota for cpu_s in t.cpu_s_R] for t in run.timed])
        inter, intra = self._bytes(policy, workload, run)
        seen = [o for round_ in run.seen for o in round_]
        chosen = Counter(f"{o.choice.planner} {_named(o.choice.exchange)}" for o in seen)
        transport = (
            "all_to_all"
            if policy.name == TRANSFORMERS
            else _most([o.choice.exchange.transport for o in seen])
        )
        return {
            "workload": workload,
            "policy": policy.name,
            "transport": transport,
            "chunks": 1 if not seen else int(_most([str(o.choice.exchange.chunks) for o in seen])),
            "codec": policy.codec,
            "chosen": ", ".join(f"{name} x{n}" for name, n in chosen.most_common())
            if policy.exchange is None
            else "",
            "max_mean_before": round(1.0 if policy.name == IDEAL else float(np.mean(before)), 3),
            "max_mean_after": round(
                float(np.mean([max_over_mean(o.plan.rows_R) for o in seen] or before)), 3
            ),
            "step_ms_median": round(float(np.median(mine)), 1),
            "step_ms_spread": round(float(high - low), 1),
            "speedup_vs_transformers": round(float(np.median(ratio[TRANSFORMERS])), 4),
            "percent_of_ideal": round(100 * float(np.median(ratio[IDEAL])), 2),
            "inter_bytes": inter,
            "intra_bytes": intra,
            "guests": round(sum(o.plan.guests for o in seen) / max(1, len(run.seen)), 2),
            "plan_ms": round(sum(o.plan_ms for o in seen) / max(1, len(run.seen)), 3),
            "waiting_ms_mean": round(float(waiting_ms.mean()), 1),
            "waiting_ms_most": round(float(waiting_ms.mean(axis=0).max()), 1),
            "joules": round(float(np.median([t.joules for t in run.timed])), 3),
            "energy_source": run.timed[0].energy_source,
            "predicted_ms": round(float(np.median(run.predicted_ms)), 1) if policy.codec == "none" else None,
        }

    def _bytes(self, policy: Policy, workload: str, run: Run) -> tuple[int, int]:
        """Bytes of all ranks in one step, mean over rounds, between nodes and inside them."""
        if policy.name == TRANSFORMERS:
            steps = [self._pair_bytes(self.cases.counts(workload, PAST + i)) for i in range(len(run.timed))]
            return tuple(int(n) for n in np.mean(steps, axis=0))  # type: ignore[return-value]
        mine = torch.zeros(2, dtype=torch.int64)
        for o in (o for round_ in run.seen for o in round_):
            mine += torch.tensor(
                [o.tokens.inter_bytes + o.weights.inter_bytes, o.tokens.intra_bytes + o.weights.intra_bytes]
            )
        dist.all_reduce(mine)
        inter, intra = (mine // len(run.timed)).tolist()
        return inter, intra

    def _pair_bytes(self, counts: list[Any]) -> tuple[float, float]:
        """transformers sends a row for each (token, expert) pair, there and back, and so do their gradients."""
        node_R = self.carriers["none"].domain.nodes.node_R
        inter = intra = 0
        for counts_RE in counts:
            rows_RR = np.stack(
                [counts_RE[:, self.homes.rank_E == r].sum(axis=1) for r in range(self.ranks)], axis=1
            )
            far_RR = node_R[:, None] != node_R[None, :]
            inter += int(rows_RR[far_RR].sum())
            intra += int(rows_RR[~far_RR].sum() - np.trace(rows_RR))
        row_bytes = 4 * self.samples.row_bytes
        return inter * row_bytes, intra * row_bytes


def _named(exchange: Exchange) -> str:
    return exchange.transport if exchange.chunks == 1 else f"{exchange.transport}/{exchange.chunks}"


def _most(names: list[str]) -> str:
    return Counter(names).most_common(1)[0][0]
