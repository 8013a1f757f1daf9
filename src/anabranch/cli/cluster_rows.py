"""What the cluster benchmark reports of one policy on one workload: one flat row.

Shape suffixes: R ranks, E experts.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from anabranch.cli.cluster_cases import ClusterCases
from anabranch.cli.cluster_model import Timed
from anabranch.experts.adaptive import Observation
from anabranch.placement.base import Homes, IntArray, max_over_mean
from anabranch.placement.choice import Exchange
from anabranch.placement.nodes import Nodes

TRANSFORMERS, IDEAL, AUTO = "transformers", "ideal", "auto"


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

    def forget_last(self) -> None:
        """As if the last round had not been."""
        for kept in (self.timed, self.seen, self.predicted_ms):
            if kept:
                kept.pop()

    @property
    def step_ms(self) -> list[float]:
        return [timed.step_ms for timed in self.timed]

    @property
    def program(self) -> list[Hashable]:
        """What ran in each round, to be compared with another run's: exchanges and plans of the layers."""
        return [tuple((o.choice.exchange, o.plan.quota_RE.tobytes()) for o in seen) for seen in self.seen]


def policies(exchanges: Sequence[Exchange]) -> list[Policy]:
    """Everything compared: fixed planners over the exchange with the fewest rows, two of them over plain
    all_to_all and in two chunks, one with int8 rows, our choice, and the ideal."""
    best = exchanges[-1].transport
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


class Reporter(NamedTuple):
    """Turns runs into rows. row_bytes: of a token's row as computed; cpu: each rank's quota, None without."""

    cases: ClusterCases
    homes: Homes
    nodes: Nodes
    row_bytes: int
    cpu: float | None

    def row(
        self, workload: str, policy: Policy, runs: dict[Policy, Run], counts: list[list[IntArray]]
    ) -> dict[str, Any]:
        """counts: of each round, of each layer; the policy took part in the first ones.

        Collective: bytes are summed over ranks, which all return the same.
        """
        run = runs[policy]
        counts = counts[: len(run.timed)]
        return {
            "workload": workload,
            "policy": policy.name,
            "rounds": len(run.timed),
            **self._what(policy, run),
            **self._balance(policy, run, counts),
            **self._times(policy, runs),
            **self._bytes(policy, run, counts),
            **self._ranks(run),
            "predicted_ms": round(float(np.median(run.predicted_ms)), 1) if policy.codec == "none" else None,
        }

    def _what(self, policy: Policy, run: Run) -> dict[str, Any]:
        """The exchange used most, and all that were where the policy chooses."""
        used = Counter((o.choice.planner, o.choice.exchange) for seen in run.seen for o in seen)
        exchange = policy.exchange or used.most_common(1)[0][0][1]
        chosen = ", ".join(
            f"{planner} {e.transport}/{e.chunks} x{n}" for (planner, e), n in used.most_common()
        )
        return {
            "transport": exchange.transport,
            "chunks": exchange.chunks,
            "codec": policy.codec,
            "chosen": chosen if policy.exchange is None else "",
        }

    def _balance(self, policy: Policy, run: Run, counts: list[list[IntArray]]) -> dict[str, Any]:
        rounds = len(run.timed)
        before = [self.cases.max_mean_of(of_layers) for of_layers in counts]
        plans = [o.plan for seen in run.seen for o in seen]
        after = [max_over_mean(plan.rows_R) for plan in plans] or before
        return {
            "max_mean_before": round(1.0 if policy.name == IDEAL else float(np.mean(before)), 3),
            "max_mean_after": round(float(np.mean(after)), 3),
            "guests": round(sum(plan.guests for plan in plans) / rounds, 2),
            "plan_ms": round(sum(o.plan_ms for seen in run.seen for o in seen) / rounds, 3),
        }

    def _times(self, policy: Policy, runs: dict[Policy, Run]) -> dict[str, Any]:
        """Ratios are taken within a round, where the machine's other load hit both sides alike, then their median."""
        mine = np.array(runs[policy].step_ms)
        ratio: dict[str, float] = {}
        for other in (p for p in runs if p.name in (TRANSFORMERS, IDEAL)):
            theirs = np.array(runs[other].step_ms)
            common = min(mine.size, theirs.size)
            ratio[other.name] = float(np.median(theirs[:common] / mine[:common]))
        low, high = np.percentile(mine, [25, 75])
        return {
            "step_ms_median": round(float(np.median(mine)), 1),
            "step_ms_spread": round(float(high - low), 1),
            "step_ms_rounds": [round(float(ms), 1) for ms in mine],
            "speedup_vs_transformers": round(ratio[TRANSFORMERS], 4),
            "percent_of_ideal": round(100 * ratio[IDEAL], 2),
        }

    def _bytes(self, policy: Policy, run: Run, counts: list[list[IntArray]]) -> dict[str, Any]:
        """Bytes of all ranks in one step, mean over rounds, between nodes and inside them."""
        rounds = len(run.timed)
        if policy.name == TRANSFORMERS:
            steps = [self._pair_bytes(of_layers) for of_layers in counts]
            inter, intra = np.mean(steps, axis=0).astype(int).tolist()
        else:
            moved = [(*o.tokens, *o.weights) for seen in run.seen for o in seen]
            total = torch.tensor(moved, dtype=torch.int64).sum(dim=0)
            dist.all_reduce(total)
            intra, inter = ((total[:2] + total[2:]) // rounds).tolist()
        return {"inter_bytes": inter, "intra_bytes": intra}

    def _pair_bytes(self, counts: Sequence[IntArray]) -> tuple[int, int]:
        """transformers sends a row for each (token, expert) pair, there and back, and so do their gradients."""
        far_RR = self.nodes.node_R[:, None] != self.nodes.node_R[None, :]
        inter = intra = 0
        for counts_RE in counts:
            by_home = [counts_RE[:, self.homes.rank_E == r].sum(axis=1) for r in range(self.homes.ranks)]
            rows_RR = np.stack(by_home, axis=1)
            inter += int(rows_RR[far_RR].sum())
            intra += int(rows_RR[~far_RR].sum() - np.trace(rows_RR))
        return inter * 4 * self.row_bytes, intra * 4 * self.row_bytes

    def _ranks(self, run: Run) -> dict[str, Any]:
        """What a rank did not compute it waited: the step less its CPU time over its quota. And joules of all."""
        quota = self.cpu or 1.0
        waiting_ms = np.array([[t.step_ms - 1e3 * cpu_s / quota for cpu_s in t.cpu_s_R] for t in run.timed])
        return {
            "waiting_ms_R": [round(float(ms), 1) for ms in np.median(waiting_ms, axis=0)],
            "joules": round(float(np.median([t.joules for t in run.timed])), 3),
            "energy_source": run.timed[0].energy_source,
        }
