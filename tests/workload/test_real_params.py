"""The counted parameters are those of the model that transformers builds, exactly, in total and by part."""

import re

import pytest
import torch
from tests.workload.toy_configs import TOYS, toy
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from anabranch.workload.hf_config import shape_from_config

# What a parameter belongs to, by its name in any family; the first that fits counts.
PARTS = {
    "attention": r"\.(self_attn|attn|attention)\.",
    "shared": r"\.shared_",
    "experts": r"\.experts\.",
    "router": r"\.(gate|router)\.",
    "dense": r"\.(mlp|feed_forward)\.",
    "head": r"lm_head",
    "positions": r"\.wpe\.",
    "embedding": r"embed|\.wte\.",
    "norms": r"norm|\.ln_",
}


def real_model(config: dict[str, object]) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def real_parts(model: nn.Module) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_of_every_family(name):
    config = toy(name)
    shape, real = shape_from_config(config), real_parts(real_model(config))
    counted = shape.params_by_part._asdict()
    counted.pop("mtp")  # transformers builds none
    assert counted == real
    assert shape.params == sum(real.values())
