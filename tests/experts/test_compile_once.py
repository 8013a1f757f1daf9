"""The fixed-size path compiles once over many routings, forward and backward, with the eager result."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from anabranch.experts.adaptive import AdaptiveExperts
from anabranch.experts.grouped import experts_forward
from anabranch.placement.base import Homes
from anabranch.placement.choice import Exchange, FixedChoice
from anabranch.placement.policy import make_planner
from anabranch.transport import make_domain, make_transport
from anabranch.workload.routing import WORKLOADS, reachable_max_mean, routing_ids
from run_distributed import RankPool

EXPERTS, TOP_K, TOKENS, HIDDEN, WIDTH = 8, 2, 64, 32, 48
DATA_DEPENDENT = re.compile(
    r"\b(arg)?sort\b|\bnonzero\b|\bmasked_select\b|\bunique|\bitem\b|\btolist\b|\bbincount\b"
)


def _layer(dtype: torch.dtype) -> tuple[AdaptiveExperts, list[nn.Parameter]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).to(dtype)
    homes = Homes.contiguous(EXPERTS, ranks)
    module.num_experts = homes.slots
    mine = slice(rank * homes.slots, (rank + 1) * homes.slots)
    for name, whole in list(module.named_parameters()):
        nn.init.normal_(whole, std=0.1)
        module._parameters[name] = nn.Parameter(whole.detach()[mine].clone())
    names = [name for name, _ in module.named_parameters()]
    group = dist.group.WORLD
    assert group is not None
    transport = make_transport("all_gather", make_domain(group, torch.device("cpu")))
    forward = experts_forward(module, names, module.forward)
    chooser = FixedChoice(make_planner("exact"), Exchange("all_gather"))
    layer = AdaptiveExperts(group, homes, chooser, {"all_gather": transport}, forward)
    return layer, [module._parameters[name] for name in names]


def _routing(index: int) -> torch.Tensor:
    """This rank's ids of routing `index`; the ragged workload's batches are brought to the fixed size."""
    code = list(WORKLOADS)[index % len(WORKLOADS)]
    sizes: dict[str, Any] = {"ranks": 2, "experts": EXPERTS, "tokens": TOKENS, "top_k": TOP_K} | {
        "step": index,
        "seed": index,
    }
    low, high = reachable_max_mean(code, **sizes)
    ids = routing_ids(code, **sizes, max_mean=min(max(1.4, low), high))[dist.get_rank()]
    return torch.from_numpy(np.resize(ids, (TOKENS, TOP_K)))


def _run(
    step: Any, layer: AdaptiveExperts, home: list[nn.Parameter], ids: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    x = torch.randn(TOKENS, HIDDEN, generator=draw).to(home[0].dtype).requires_grad_()
    weights = torch.rand(TOKENS, TOP_K, generator=draw).to(home[0].dtype).requires_grad_()
    for p in home:
        p.grad = None
    choice = layer.choose(ids)
    y = step(home, x, weights, layer.prepare(choice.plan, choice.exchange, ids))
    y.float().square().sum().backward()
    return [t.detach() for t in (y, x.grad, weights.grad, *(p.grad for p in home)) if t is not None]


def _compiles_once(dtype_name: str, backend_name: str, routings: int) -> dict[str, Any]:
    layer, home = _layer(getattr(torch, dtype_name))
    backend, graphs = lookup_backend(backend_name), []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer.run, fullgraph=True, dynamic=False, backend=counting)
    worst, guests = 0.0, 0
    for index in range(routings):
        ids = _routing(index)
        guests += layer.choose(ids).plan.guests
        for ours, eager in zip(
            _run(compiled, layer, home, ids, index), _run(layer.run, layer, home, ids, index), strict=True
        ):
            worst = max(worst, float((ours - eager).abs().max() / eager.abs().max().clamp_min(1e-9)))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return {"graphs": len(graphs), "worst": worst, "guests": guests, "called": called}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "bfloat16"])
def test_fixed_size_path_compiles_once_over_200_routings(ranks2: RankPool, dtype: str) -> None:
    for seen in ranks2.run(_compiles_once, dtype, "aot_eager", 200):
        assert seen["graphs"] == 1
        assert seen["guests"] > 200, "the routings are skewed enough that guests travel"
        assert seen["worst"] == 0.0, "aot_eager runs the same kernels: bit-equal to eager"
        assert any("grouped_mm" in call for call in seen["called"])
        assert not [call for call in seen["called"] if DATA_DEPENDENT.search(call)]


@pytest.mark.full
# torch 2.13's inductor imports torch.utils.mkldnn, which scripts methods at import.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_agrees_with_eager(ranks2: RankPool) -> None:
    for seen in ranks2.run(_compiles_once, "float32", "inductor", 24, timeout_s=280):
        assert seen["graphs"] == 1
        assert seen["worst"] < 1e-5
