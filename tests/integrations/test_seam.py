"""What the seam takes from transformers and torch: a failure names what moved, and who needs it."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.integrations.toy_models import FAMILIES, toy_config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, Llama4TextConfig, core_model_loading
from transformers.distributed import DistributedConfig
from transformers.distributed import expert_parallel as ep
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import anabranch
from anabranch.integrations.transformers import NAME, AdaptiveEP, UnevenExpertShard
from run_distributed import RankPool

ADAPTIVE = "integrations/transformers.py: AdaptiveEP"
EMPTY = "integrations/empty_share.py"
GROUPED = "experts/grouped.py"


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_an_implementation_is_registered_by_name_and_built_with_two_meshes() -> None:
    assert parameters_of(ep.EPImplementationInterface.register) == ["key", "value"], (
        f"EPImplementationInterface.register; {ADAPTIVE} is registered through it"
    )
    assert parameters_of(ep.EPImplementation.__init__) == ["self", "experts", "ep_mesh", "tp_mesh"], (
        f"EPImplementation.__init__; {ADAPTIVE} passes these on"
    )
    called = parameters_of(ep.EPImplementation.__call__)
    assert called == ["self", "hidden_states", "top_k_index", "top_k_weights"], (
        f"EPImplementation.__call__; {ADAPTIVE} takes global expert ids and weights there"
    )
    anabranch.enable()
    assert issubclass(ep.EPImplementationInterface()[NAME], AdaptiveEP), (
        "the registry does not return what it got"
    )


def test_the_config_names_the_implementation() -> None:
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation=NAME)
    assert (config.ep_implementation, config.efsdp_size) == (NAME, 1), (
        "DistributedConfig: fields of the README"
    )


class Recorder(ep.EPImplementation):
    """Records what transformers hands to an implementation."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.sharded_first = isinstance(experts.gate_up_proj, DTensor)
        experts.recorder = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        self.local = {name: not isinstance(p, DTensor) for name, p in self.experts._parameters.items()}
        self.types = (hidden_states.dtype, top_k_index.dtype, top_k_weights.dtype)
        return hidden_states * top_k_weights.sum()


def record() -> dict[str, Any]:
    ep.EPImplementationInterface.register("recorder", Recorder)
    config = toy_config("mixtral", 8)
    config.distributed_config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="recorder")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "tp"))["tp"]
    experts = model.model.layers[0].mlp.experts
    before = (experts.forward, experts.num_experts)
    plan = model._expand_parallel_plan(model.ep_plan)
    ep.apply_expert_parallelism(model, mesh, alone, plan, ep_implementation="recorder")
    rows, ids, weights = torch.ones(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2).double()
    experts(rows, ids, weights)
    seen = experts.recorder
    return {
        "sharded_first": seen.sharded_first,
        "placements": [str(p.placements) for p in experts.parameters()],
        "own_forward": seen.experts_forward == before[0],
        "local_experts": (before[1], experts.num_experts),
        "local_parameters": seen.local,
        "types": seen.types,
        "meshes": (seen.ep_mesh is mesh, seen.tp_mesh is alone),
    }


def test_what_an_implementation_is_handed(ranks2: RankPool) -> None:
    for seen in ranks2.run(record):
        assert seen["sharded_first"], (
            f"{ADAPTIVE} finds the sharded parameters on construction: DTensors, by then"
        )
        assert seen["placements"] == ["(Shard(dim=0),)"] * 2, (
            "experts are not sharded on dim 0 any more: Homes"
        )
        assert seen["own_forward"], (
            f"EPImplementation.experts_forward is not the module's own; {GROUPED}: OwnForward"
        )
        assert seen["local_experts"] == (8, 4), "module.num_experts is not set to the local number"
        assert seen["local_parameters"] == {"gate_up_proj": True, "down_proj": True}, (
            f"_parameters holds no local tensors during the call; {ADAPTIVE} reads them there"
        )
        types = (torch.float32, torch.int64, torch.float64)
        assert seen["types"] == types, "the order of tokens, expert ids and weights, or a cast on the way"
        assert seen["meshes"] == (True, True), "EPImplementation keeps ep_mesh and tp_mesh"


def shard_five_experts(style: Any) -> tuple[int, tuple[int, ...]] | str:
    module = nn.Module()
    module.num_experts = 5
    module.gate_up_proj = nn.Parameter(torch.empty(5, 4, 2, device="meta"))
    try:
        style.shard_param(module, "gate_up_proj", init_device_mesh("cpu", (2,)))
    except ValueError as error:
        return str(error)
    return module.num_experts, tuple(module.gate_up_proj.to_local().shape)


def test_experts_that_do_not_divide_need_our_style(ranks2: RankPool) -> None:
    assert parameters_of(ep.MoEParamShard.__init__) == ["self", "placement", "shards_expert_dim"], (
        "MoEParamShard.__init__; UnevenExpertShard is built with it"
    )
    assert parameters_of(ep.MoEParamShard.shard_param) == ["self", "module", "param", "mesh"], (
        "MoEParamShard.shard_param; UnevenExpertShard overrides it"
    )
    own, ours = (style(Shard(0), shards_expert_dim=True) for style in (ep.MoEParamShard, UnevenExpertShard))
    assert all("Cannot evenly shard" in said for said in ranks2.run(shard_five_experts, own)), (
        "MoEParamShard takes uneven experts now: UnevenExpertShard may go"
    )
    assert ranks2.run(shard_five_experts, ours) == [(3, (3, 4, 2)), (3, (2, 4, 2))]
    anabranch.enable()
    assert isinstance(ALL_PARALLEL_STYLES["grouped_gemm"], UnevenExpertShard), (
        "the rule `grouped_gemm` was renamed"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_plans_speak_two_words(family) -> None:
    """The two styles an expert plan consists of, on an experts module and on each of its parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toy_config(family, 8))
    plan = model._expand_parallel_plan(model.ep_plan)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    dispatched = {name for name, style in plan.items() if style == "ep_dispatch_experts"}
    sharded = {name for name, style in plan.items() if style == "grouped_gemm"}
    assert len(dispatched) == 2, f"{family}: the plan names no experts modules with ep_dispatch_experts"
    assert dispatched | sharded == plan.keys(), (
        f"{family}: a style in the expert plan that the seam does not know"
    )
    assert sharded == {name for name in parameters if name.rpartition(".")[0] in dispatched}, (
        f"{family}: an expert parameter without a grouped_gemm rule"
    )
    for name in dispatched:
        check_flags(modules[name])


def check_flags(experts: nn.Module) -> None:
    what = f"{type(experts).__name__}; {GROUPED}: SortedForward reads it"
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    expected = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if experts.has_bias else set())
    assert experts._parameters.keys() == expected, f"parameter names of {what}"
    assert experts.has_post_expert_norm is False, f"has_post_expert_norm of {what}"
    assert callable(experts._apply_gate if experts.has_gate else experts.act_fn), (
        f"gate or activation of {what}"
    )
    assert experts.config._experts_implementation == "grouped_mm", f"config._experts_implementation of {what}"
    hidden = experts.config.hidden_size
    assert experts._parameters[up].shape[1 if experts.is_transposed else 2] == hidden, (
        f"is_transposed of {what}"
    )


def test_flags_differ_where_layouts_do() -> None:
    with torch.device("meta"):
        models = [
            AutoModelForCausalLM.from_config(toy_config(f, 8)) for f in ("mixtral", "gpt_oss", "nemotron_h")
        ]
    flags = {
        type(m).__name__: (m.has_gate, m.has_bias, m.is_transposed)
        for model in models
        for m in model.modules()
        if hasattr(m, "has_gate")
    }
    assert flags == {
        "MixtralExperts": (True, False, False),
        "GptOssExperts": (True, True, True),
        "NemotronHExperts": (False, False, False),
    }, f"use_experts_implementation; {GROUPED} needs its flags"
    assert {"grouped_mm", "batched_mm"} <= set(ALL_EXPERTS_FUNCTIONS), "names of the experts implementations"


def test_loading_rules_are_what_the_empty_share_replaces() -> None:
    for rule in (core_model_loading.WeightConverter, core_model_loading.WeightRenaming):
        convert = inspect.unwrap(rule.convert)
        assert parameters_of(convert)[:3] == ["self", "layer_name", "model"], (
            f"{rule.__name__}.convert; {EMPTY} wraps it"
        )
    renaming = core_model_loading.WeightRenaming("a.weight", "b.weight")
    assert renaming.target_patterns == ["b.weight"], (
        f"WeightRenaming.target_patterns; {EMPTY} names results by it"
    )
    assert hasattr(renaming.collected_tensors, "clear"), (
        f"WeightRenaming.collected_tensors; {EMPTY} drops them"
    )
    merge = core_model_loading.MergeModulelist(dim=0)
    with pytest.raises(RuntimeError, match="non-empty TensorList"):
        merge.convert(
            {"experts.*.w": []}, ["experts.*.w"], ["experts.w"]
        )  # once it passes, the wrapper may go


def slice_a_share() -> str:
    """One expert on two ranks, from a checkpoint that holds all experts in one tensor."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.empty(1, 4, 2, device="meta"))
    ours = UnevenExpertShard(Shard(0), shards_expert_dim=True)
    ours.shard_param(module, "down_proj", mesh["ep"])
    fully_shard(module, mesh=mesh["efsdp"])
    try:
        return str(tuple(DtensorShardOperation(module.down_proj).shard_tensor(torch.ones(1, 4, 2)).shape))
    except IndexError as error:
        return str(error)


def test_an_empty_share_of_one_tensor_cannot_be_sliced(ranks2: RankPool) -> None:
    assert ranks2.run(slice_a_share) == ["(1, 4, 2)", "list index out of range"], (
        f"DtensorShardOperation slices an empty share now: {EMPTY} load_empty_shares may go"
    )


def empty_gradients() -> dict[str, Any]:
    """FSDP2 over this rank alone, and a parameter without elements."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "efsdp"))["efsdp"]
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(0, 4))
    module.forward = lambda x: x * 2 + module.weight.sum()
    fully_shard(module, mesh=mesh)
    try:
        module(torch.ones(2, requires_grad=True)).sum().backward()
        said = "reduced"
    except RuntimeError as error:
        said = str(error)
    groups = module._get_fsdp_state()._fsdp_param_groups
    shares = [share.sharded_param for group in groups for share in group.fsdp_params]
    return {
        "said": said,
        "is_module": isinstance(module, FSDPModule),
        "shares": [(isinstance(p, DTensor), p._local_tensor.numel()) for p in shares],
    }


def test_fsdp_needs_help_with_empty_gradients(ranks2: RankPool) -> None:
    for seen in ranks2.run(empty_gradients):
        assert "non-empty tensor" in seen["said"], (
            f"FSDP2 reduces empty gradients now: {EMPTY} bypass_sharding may go"
        )
        assert seen["is_module"], f"fully_shard makes no FSDPModule; {EMPTY} asks for it"
        assert seen["shares"] == [(True, 0)], f"FSDPParam.sharded_param; {EMPTY} gives it its gradient"


def test_torch_tells_a_recomputation() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
    outside = torch._C._current_graph_task_id()
    x.sum().backward()
    assert outside == -1, "torch._C._current_graph_task_id outside backward; experts/memory.py: recomputing"
    assert seen[0] != -1, "torch._C._current_graph_task_id inside backward; experts/memory.py: recomputing"
    with pytest.raises(RuntimeError, match="differs"):
        torch._assert_async(torch.tensor(False), "differs")


def test_llama4_has_no_expert_plan() -> None:
    """Its experts take tokens scaled beforehand: there is nothing to dispatch (docs/models.md)."""
    assert Llama4TextConfig.base_model_ep_plan is None, (
        "Llama-4 has an expert plan now: test it, mend docs/models.md"
    )
