"""Replayed routing: routers choose what they are told and weigh it by their own code."""

import pytest
import torch
from tests.integrations.toy_models import FAMILIES, micro_batch, toy_config
from transformers import AutoModelForCausalLM

from anabranch.errors import ConfigError
from anabranch.integrations.routers import experts_modules, replay, router_modules

EXPERTS = 8


def toy(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(toy_config(family, EXPERTS)).eval()


def seen_by_experts(model, ids):
    """Logits, and the ids and weights that the experts of each layer were called with."""
    calls = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: calls.append(args[1:3])) for m in experts_modules(model)
    ]
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([call[0] for call in calls]), [call[1] for call in calls]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_replaying_what_was_chosen_changes_no_bit(family) -> None:
    model, ids = toy(family), micro_batch(0, 0)
    logits, chosen_LTK, _ = seen_by_experts(model, ids)
    with replay(model, chosen_LTK):
        again, replayed_LTK, _ = seen_by_experts(model, ids)
    assert torch.equal(again, logits)
    assert torch.equal(replayed_LTK, chosen_LTK)
    assert all("forward" not in vars(router) for router in router_modules(model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_other_experts_are_chosen_and_weighed_freshly(family) -> None:
    model, ids = toy(family), micro_batch(0, 0)
    logits, chosen_LTK, weights = seen_by_experts(model, ids)
    told_LTK = (chosen_LTK + 1) % EXPERTS
    told_LTK[:, ::3] = -1
    with replay(model, told_LTK):
        other, replayed_LTK, fresh = seen_by_experts(model, ids)
    assert torch.equal(replayed_LTK[:, 1::3], told_LTK[:, 1::3])
    assert torch.equal(replayed_LTK[0, ::3], chosen_LTK[0, ::3])  # a negative id leaves the choice
    assert not torch.equal(fresh[0][1::3], weights[0][1::3])
    assert not torch.equal(other, logits)
    other.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in router_modules(model))


def test_routing_of_another_batch_or_model_is_refused() -> None:
    model, ids = toy("mixtral"), micro_batch(0, 0)
    ids_LTK = torch.zeros(2, ids.numel() + 1, 2, dtype=torch.int64)
    with replay(model, ids_LTK), pytest.raises(ConfigError, match="routing of 41 tokens for a batch of 40"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(ConfigError, match="1 layers for a model that has 2"), replay(model, ids_LTK[:1]):
        pass
