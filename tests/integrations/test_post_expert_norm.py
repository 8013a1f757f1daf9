"""Muse Spark normalises what each expert returns: a parameter of the experts module that no rank owns alone.

Every rank computes rows through it and transformers sums its gradient over the expert group, so that a rank
without a single row has to bring a gradient too. Only its text model is small enough for a toy, and has no head:
the loss is a weighted mean of squares.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.integrations.parity import gathered, relative
from tests.integrations.toy_models import micro_batch
from torch import Tensor
from transformers import AutoModel, MuseSparkTextConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

import anabranch
from run_distributed import RankPool


def write_checkpoint(folder: Path, experts: int) -> Path:
    config = MuseSparkTextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=24, moe_intermediate_size=24, moe_hidden_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        num_local_experts=experts, num_experts_per_tok=2, sliding_window=16, layer_rope_theta=[500000.0, 0],
        layer_types=["sliding_attention", "full_attention"], mlp_layer_types=["sparse", "sparse"],
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            scale = 0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
            tensor.copy_(scale * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return folder


def gradients(model: PreTrainedModel, batches: list[int]) -> dict[str, Tensor]:
    model.train()
    for batch in batches:
        hidden = model(input_ids=micro_batch(0, batch), use_cache=False).last_hidden_state
        weighted = hidden * torch.linspace(-1, 1, hidden.shape[-1])
        (weighted.square().mean() / len(batches)).backward()
    return gathered({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, True)


def gradients_on_rank(folder: Path, planner: str, transport: str) -> dict[str, Tensor]:
    anabranch.enable(planner, epsilon=0.0, transport=transport)
    ranks = dist.get_world_size()
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="anabranch")
    return gradients(AutoModel.from_pretrained(folder, distributed_config=config), [dist.get_rank()])


@pytest.mark.parametrize(
    ("ranks", "experts", "planner", "transport"),
    [
        (2, 8, "exact", "all_to_all"),
        (2, 8, "bounded", "all_gather"),
        (4, 6, "static", "dedup"),  # the last rank owns no expert and computes no row
        (4, 6, "exact", "all_to_all"),
    ],
)
def test_its_gradient_comes_from_all_ranks(ranks, experts, planner, transport, tmp_path, request) -> None:
    folder = write_checkpoint(tmp_path, experts)
    expected = gradients(AutoModel.from_pretrained(folder), list(range(ranks)))
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    for found in pool.run(gradients_on_rank, folder, planner, transport, timeout_s=60):
        assert found.keys() == expected.keys()
        assert any("post_expert_norm" in name for name in found)
        assert max(relative(found[name], expected[name]) for name in expected) <= 1e-5
