"""`anabranch bench balance`: one MoE layer, forward and backward, under every policy and workload.

All policies share the weights, the inputs and the routing of a workload and are measured interleaved in one
run. The layer is transformers' own Qwen3-MoE experts module. With a core for every rank a step is wall time, to
the last rank's end. With fewer cores than ranks wall time hides imbalance (a waiting rank's core is lent to a
loaded one), so a step is then the CPU time of the busiest rank; the column `clock` says which.

Shape suffixes: R ranks, S tokens of this rank, K experts a token, D hidden size, L experts a rank.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Qwen3MoeConfig
from transformers.distributed.expert_parallel import AllToAllEP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from anabranch.cli.device import device
from anabranch.experts.adaptive import AdaptiveExperts, Observation
from anabranch.experts.grouped import experts_forward
from anabranch.placement.base import Homes, Plan, max_over_mean
from anabranch.placement.choice import Exchange, FixedChoice
from anabranch.placement.policy import make_planner
from anabranch.transport.choose import make_transport
from anabranch.transport.domain import make_domain
from anabranch.workload.routing import WORKLOADS, reachable_max_mean, routing_ids
from anabranch.workload.trace import load_trace

POLICIES = ("transformers", "static", "least_loaded", "exact", "bounded", "ideal")


@dataclass(frozen=True)
class BalanceBench:
    """Sizes of the measured layer. `trace`: path of a recorded routing trace, "" for none."""

    ranks: int
    hidden: int = 512
    width: int = 1024
    experts: int = 16
    top_k: int = 4
    tokens: int = 2048
    max_mean: float = 1.5
    rounds: int = 5
    slots: int = 4
    transport: str = "dedup"
    dtype: str = "float32"
    trace: str = ""

    @property
    def clock(self) -> str:
        """ "wall" where every rank has a core, else "cpu": CPU time of the busiest rank."""
        return "wall" if self.ranks <= (os.cpu_count() or 1) else "cpu"


class Case(NamedTuple):
    """One workload on one rank: its inputs, and the evenly routed ones of the ideal."""

    workload: str
    x_SD: Tensor
    ids_SK: Tensor
    weights_SK: Tensor
    even_ids_SK: Tensor


class Measured(NamedTuple):
    """One policy on one workload: rank times of each round, and what the adaptive layer reported."""

    step_ms: list[float]
    seen: Observation | None


def bench_balance_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank. Returns {"rows": [...]}, the same on every rank."""
    bench = BalanceBench(**settings)
    dist.init_process_group(torch.distributed.get_default_backend_for_device(device()))
    torch.manual_seed(0)
    mesh = init_device_mesh(device().type, (1, bench.ranks), mesh_dim_names=("tp", "ep"))
    module = _experts(bench, mesh["ep"])
    steps = _policies(bench, module, mesh)
    rows: list[dict[str, Any]] = []
    for case in _cases(bench):
        rows += _measure(bench, case, module, steps)
    return {"rows": rows}


def _experts(bench: BalanceBench, ep_mesh: DeviceMesh) -> nn.Module:
    """This rank's share of the layer: plain local parameters, as the layer sees them inside a forward."""
    config = Qwen3MoeConfig(
        hidden_size=bench.hidden, moe_intermediate_size=bench.width, num_experts=bench.experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)  # attributes of its own, which nn.Module's typing does not know
    module.num_experts = Homes.contiguous(bench.experts, ep_mesh.size()).slots
    module._is_expert_parallel = True
    for name, whole in list(module.named_parameters(recurse=False)):
        shape = (module.num_experts, *whole.shape[1:])
        local = torch.randn(shape, dtype=getattr(torch, bench.dtype), device=device()) * 0.02
        module._parameters[name] = nn.Parameter(local)
    return module


Step = Callable[[Case], Tensor]


class _Policy(NamedTuple):
    step: Step
    layer: AdaptiveExperts | None


def _policies(bench: BalanceBench, module: nn.Module, mesh: DeviceMesh) -> dict[str, _Policy]:
    theirs = AllToAllEP(module, mesh["ep"], mesh["tp"])
    policies = {"transformers": _Policy(lambda c: theirs(c.x_SD, c.ids_SK, c.weights_SK), None)}
    names = [n for n, _ in module.named_parameters(recurse=False)]
    homes = Homes.contiguous(bench.experts, bench.ranks)
    group = mesh["ep"].get_group()
    transports = {bench.transport: make_transport(bench.transport, make_domain(group, device()))}
    for policy in POLICIES[1:]:
        planner = make_planner("static" if policy == "ideal" else policy, slots=bench.slots)
        chooser = FixedChoice(planner, Exchange(bench.transport))
        forward = experts_forward(module, names, module.forward)
        layer = AdaptiveExperts(group, homes, chooser, transports, forward)
        policies[policy] = _Policy(_ours(layer, module, names, even=policy == "ideal"), layer)
    return policies


def _ours(layer: AdaptiveExperts, module: nn.Module, names: list[str], *, even: bool) -> Step:
    def step(case: Case) -> Tensor:
        home = [module.get_parameter(n) for n in names]
        return layer(home, case.x_SD, case.even_ids_SK if even else case.ids_SK, case.weights_SK)

    return step


def _cases(bench: BalanceBench) -> list[Case]:
    sizes = {"ranks": bench.ranks, "experts": bench.experts, "tokens": bench.tokens, "top_k": bench.top_k}
    even = routing_ids("W0", **sizes, max_mean=1.0, seed=1)
    cases = []
    for code, workload in WORKLOADS.items():
        step = 3 if code == "W7" else 1  # the micro-batch of the burst
        low, high = reachable_max_mean(code, **sizes, step=step, seed=1)
        wanted = min(max(bench.max_mean, low), high)
        ids = routing_ids(code, **sizes, max_mean=wanted, step=step, seed=1)
        cases.append(_case(bench, f"{code} {workload.name}", ids, even))
    if bench.trace:
        cases.append(_case(bench, "natural", _natural_ids(bench), even))
    return cases


def _natural_ids(bench: BalanceBench) -> list[np.ndarray]:
    """The recorded micro-batch of median skew, its tokens repeated or cut to the bench's number a rank."""
    trace = load_trace(Path(bench.trace))
    homes = Homes.contiguous(bench.experts, bench.ranks)
    skew_N = []
    for counts_RE in trace.counts_NRE:
        load_R = np.bincount(homes.rank_E, weights=counts_RE.sum(axis=0), minlength=bench.ranks)
        skew_N.append(max_over_mean(load_R))
    record = int(np.argsort(skew_N)[len(skew_N) // 2])
    tokens_TK = np.concatenate(trace.ids_of(record))
    needed = bench.ranks * bench.tokens
    return np.split(np.resize(tokens_TK, (needed, tokens_TK.shape[1])), bench.ranks)


def _case(bench: BalanceBench, name: str, ids: list[np.ndarray], even: list[np.ndarray]) -> Case:
    rank, here, dtype = dist.get_rank(), device(), getattr(torch, bench.dtype)
    ids_SK = torch.from_numpy(ids[rank]).to(here)
    x_SD = torch.randn(ids_SK.shape[0], bench.hidden, dtype=dtype, device=here, requires_grad=True)
    weights_SK = torch.rand(ids_SK.shape, dtype=dtype, device=here).softmax(-1).requires_grad_()
    even_ids = torch.from_numpy(np.resize(even[rank], ids_SK.shape)).to(here)
    return Case(name, x_SD, ids_SK, weights_SK, even_ids)


def _measure(
    bench: BalanceBench, case: Case, module: nn.Module, policies: dict[str, _Policy]
) -> list[dict[str, Any]]:
    """Every policy once per round, in an order that turns, so that drift of the machine hits all alike."""
    names = list(policies)
    times: dict[str, list[float]] = {name: [] for name in names}
    seen: dict[str, Observation] = {}
    for name, policy in policies.items():
        if policy.layer is not None:
            policy.layer.observers[:] = [lambda o, name=name: seen.__setitem__(name, o)]
        _timed_ms(policy.step, case, module, bench.clock)  # warm-up
    for turn in range(bench.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_timed_ms(policies[name].step, case, module, bench.clock))
    return [_row(bench, case, name, times, seen) for name in names]


def _pair_bytes(bench: BalanceBench, plan: Plan) -> int:
    """Bytes this rank sends under the identity plan when every pair travels: there, back, and both again backward."""
    rank = dist.get_rank()
    mine_E = plan.homes.rank_E == rank
    out = int(plan.counts_RE[rank, ~mine_E].sum())
    back = int(plan.counts_RE[:, mine_E].sum() - plan.counts_RE[rank, mine_E].sum())
    return 2 * (out + back) * bench.hidden * torch.finfo(getattr(torch, bench.dtype)).bits // 8


def _timed_ms(step: Step, case: Case, module: nn.Module, clock: str) -> float:
    """Forward and backward: from a common start to the last rank's end, or the most CPU time of a rank."""
    now_s = time.perf_counter if clock == "wall" else time.process_time
    case.x_SD.grad = case.weights_SK.grad = None
    module.zero_grad(set_to_none=True)
    dist.barrier()
    started = now_s()
    y_SD = step(case)
    y_SD.backward(torch.ones_like(y_SD))
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        torch.accelerator.synchronize(accelerator)
    took = torch.tensor([1e3 * (now_s() - started)], dtype=torch.float64, device=device())
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _row(
    bench: BalanceBench, case: Case, name: str, times: dict[str, list[float]], seen: dict[str, Observation]
) -> dict[str, Any]:
    # Ratios are taken within a round, where the machine's other load hit both sides alike, then their median.
    mine = np.array(times[name])
    speedup = float(np.median(np.array(times["transformers"]) / mine))
    of_ideal = float(np.median(np.array(times["ideal"]) / mine))
    # transformers shares the static plan, but sends one row for each (token, expert) pair, there and back.
    shown = seen.get(name, seen["static"])
    token_bytes = shown.token_bytes if name in seen else _pair_bytes(bench, shown.plan)
    moved = torch.tensor([token_bytes, shown.weight_bytes], dtype=torch.int64, device=device())
    dist.all_reduce(moved)
    low, high = np.percentile(times[name], [25, 75])
    return {
        "ranks": bench.ranks,
        "workload": case.workload,
        "policy": name,
        "max_mean_before": round(max_over_mean(shown.plan.home_rows_R), 4),
        "max_mean_after": round(max_over_mean(shown.plan.rows_R), 4),
        "buffer_rows": int(shown.plan.rows_R.max()),
        "token_bytes": int(moved[0]),
        "weight_bytes": int(moved[1]),
        "guests": shown.plan.guests,
        "step_ms_median": round(float(np.median(mine)), 2),
        "step_ms_spread": round(float(high - low), 2),
        "speedup_vs_transformers": round(speedup, 4),
        "percent_of_ideal": round(100 * of_ideal, 2),
        "plan_ms": round(shown.plan_ms, 3) if name in seen else 0.0,
        "transport": bench.transport if name in seen else "all_to_all",
        "clock": bench.clock,
        **{k: v for k, v in asdict(bench).items() if k not in ("ranks", "trace", "max_mean", "transport")},
    }
