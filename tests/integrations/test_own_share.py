"""A rank holds its shares of a model, and of the rest nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

from anabranch.integrations.own_share import own_shares
from anabranch.training.residents import resident_bytes
from run_distributed import RankPool


def _held(folder: str) -> tuple[int, int, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    loaded, ids_BS = resident_bytes(model.parameters()), torch.arange(32).view(2, 16)
    own_shares(model)
    held = resident_bytes(model.parameters())
    return loaded, held, float(model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.detach())


def test_what_other_ranks_hold_is_freed(ranks2: RankPool, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    ids_BS = torch.arange(32).view(2, 16)
    expected = float(model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.detach())
    whole = 4 * sum(p.numel() for p in model.parameters())
    for loaded, held, loss in ranks2.run(_held, str(tmp_path)):
        assert held == whole // 2
        assert loaded == whole, "transformers has learned to free the rest: own_share.py is no longer needed"
        assert loss == pytest.approx(expected, rel=1e-6)
