"""How long planning takes, and what it buys: every planner over sizes and workloads.

Shape suffixes: R ranks, E experts.
"""

from statistics import fmean, median, quantiles
from time import perf_counter_ns

from anabranch.errors import ConfigError
from anabranch.placement.assign import recv_RE, send_RE
from anabranch.placement.base import Homes, IntArray, Plan, max_over_mean
from anabranch.placement.policy import PLANNERS, make_planner
from anabranch.workload.routing import routing_counts

# (ranks, experts, top_k, max/mean of the workloads that are not balanced)
SIZES = ((2, 16, 4, 1.6), (8, 64, 8, 2.0), (64, 256, 8, 2.0))
WORKLOADS = ("balanced", "hot_set", "hot_rank", "spread")
TOKENS_PER_RANK = 4096
# Distinct micro-batches which planners see in turn, so that none is timed on one warm input.
MICRO_BATCHES = 16


def bench_planner(rounds: int = 200) -> list[dict[str, object]]:
    """Times `plan` over `rounds` micro-batches for each planner, size and workload; one flat row each.

    Keys: planner, ranks, experts, workload, plan_us_median, plan_us_p90, assign_us_median (`send_RE` and
    `recv_RE` of one rank together), and the means over the micro-batches of guests, max_mean_before and
    max_mean_after. Planners are as `make_planner` sets them by default.
    Raises ConfigError for fewer than two rounds: one has no spread.
    """
    if rounds < 2:
        raise ConfigError(f"{rounds} must be at least 2", setting="rounds")
    rows: list[dict[str, object]] = []
    for ranks, experts, top_k, max_mean in SIZES:
        for workload in WORKLOADS:
            batches = [
                routing_counts(
                    workload,
                    ranks=ranks,
                    experts=experts,
                    tokens=TOKENS_PER_RANK,
                    top_k=top_k,
                    max_mean=max_mean,
                    step=step,
                )
                for step in range(MICRO_BATCHES)
            ]
            for planner in PLANNERS:
                measured = _measure(planner, batches, Homes.contiguous(experts, ranks), rounds)
                rows.append(
                    {"planner": planner, "ranks": ranks, "experts": experts, "workload": workload, **measured}
                )
    return rows


def _measure(planner_name: str, batches: list[IntArray], homes: Homes, rounds: int) -> dict[str, float]:
    planner = make_planner(planner_name)
    plan_us: list[float] = []
    assign_us: list[float] = []
    plans: list[Plan] = []
    for i in range(rounds):
        counts_RE, rank = batches[i % len(batches)], i % homes.ranks
        start_ns = perf_counter_ns()
        plan = planner.plan(counts_RE, homes)
        planned_ns = perf_counter_ns()
        send_RE(plan, rank)
        recv_RE(plan, rank)
        assign_us.append((perf_counter_ns() - planned_ns) / 1e3)
        plan_us.append((planned_ns - start_ns) / 1e3)
        plans.append(plan)
    return {
        "plan_us_median": median(plan_us),
        "plan_us_p90": quantiles(plan_us, n=10)[-1],
        "assign_us_median": median(assign_us),
        "guests": fmean(plan.guests for plan in plans),
        "max_mean_before": fmean(max_over_mean(plan.home_rows_R) for plan in plans),
        "max_mean_after": fmean(max_over_mean(plan.rows_R) for plan in plans),
    }
