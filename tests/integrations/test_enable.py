"""What a user may get wrong when enabling the layer: one clear error each, on every rank, and no hang."""

from pathlib import Path

import pytest
import torch.distributed as dist
from tests.integrations.parity import Judge, Layout, load
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface

import anabranch
from anabranch.errors import ConfigError, RankError
from run_distributed import RankPool

SETTINGS = [
    ({"planner": "bouned"}, "planner: 'bouned' is unknown; did you mean 'bounded'"),
    ({"transport": "all2all"}, "transport: 'all2all' is not one of auto, all_to_all"),
    ({"epsilon": -0.1}, "epsilon"),
    ({"slots": 0}, "slots"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_a_wrong_setting_is_named_before_anything_is_registered(settings, message) -> None:
    before = dict(EPImplementationInterface._global_mapping)
    with pytest.raises(ConfigError, match=message) as caught:
        anabranch.enable(**settings)
    assert caught.value.setting == next(iter(settings))
    assert before == EPImplementationInterface._global_mapping


def load_unlike_the_others(folder: Path, layouts: list[Layout]) -> str:
    try:
        load(folder, layouts[dist.get_rank()])
    except RankError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Layout(2, 2, planner="static"), Layout(2, 2, planner="exact")),
        (Layout(2, 2, transport="dedup"), Layout(2, 2, transport="all_to_all")),
        (Layout(2, 2, planner="bounded", epsilon=0.1), Layout(2, 2, planner="bounded", epsilon=0.2)),
        (Layout(2, 2, planner="bounded", slots=1), Layout(2, 2, planner="bounded", slots=2)),
    ],
)
def test_ranks_that_disagree_all_say_so(first, second, ranks2: RankPool, judge: Judge) -> None:
    for rank, said in enumerate(
        ranks2.run(load_unlike_the_others, judge.checkpoint("mixtral"), [first, second])
    ):
        assert said.startswith(f"enable: ranks disagree; rank {rank} has AdaptiveSettings(")
        assert "same arguments on every rank" in said


def load_whole_experts(folder: Path) -> str:
    """An expert plan that dispatches tokens but leaves the parameters whole."""
    anabranch.enable()
    layers = "model.layers.*.mlp.experts"
    plan = {
        f"{layers}.gate_up_proj": "replicated_with_grad_allreduce",
        f"{layers}.down_proj": "replicated_with_grad_allreduce",
    }
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_plan=plan, ep_implementation="anabranch")
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_a_plan_that_shards_no_expert_is_refused(ranks2: RankPool, judge: Judge) -> None:
    for said in ranks2.run(load_whole_experts, judge.checkpoint("mixtral")):
        assert said.startswith("ep_plan: MixtralExperts has no parameter sharded by expert")
