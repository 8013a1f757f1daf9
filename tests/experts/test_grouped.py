"""The experts' computation on sorted rows equals the modules' own forward, in outputs and gradients.

Shape suffixes: N rows, J slots, D hidden size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from anabranch.experts.grouped import OwnForward, SortedForward, experts_forward

SLOTS, HIDDEN, WIDTH = 5, 8, 12
ROWS_J = (3, 0, 4, 1, 0)  # one slot in the middle and the last without rows

MODULES: dict[str, tuple[type[nn.Module], type[Any], dict[str, Any]]] = {
    "gated": (MixtralExperts, MixtralConfig, {"num_local_experts": SLOTS, "intermediate_size": WIDTH}),
    "biases, transposed": (
        GptOssExperts,
        GptOssConfig,
        {"num_local_experts": SLOTS, "intermediate_size": WIDTH, "swiglu_limit": 0.5},
    ),
    "no gate": (
        NemotronHExperts,
        NemotronHConfig,
        {"n_routed_experts": SLOTS, "moe_intermediate_size": WIDTH},
    ),
}


def build(kind: str, implementation: str) -> nn.Module:
    cls, config_cls, settings = MODULES[kind]
    config = config_cls(hidden_size=HIDDEN, **settings)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    module = cls(config)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    draw = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((output * draw).sum(), inputs))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("kind", MODULES)
def test_sorted_rows_equal_the_modules_own_forward(kind: str, implementation: str) -> None:
    module = build(kind, implementation)
    names = [name for name, _ in module.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x_ND = torch.randn(sum(ROWS_J), HIDDEN, requires_grad=True)
    slot_N = torch.repeat_interleave(torch.arange(SLOTS), torch.tensor(ROWS_J))
    ends_J = torch.tensor(ROWS_J).cumsum(0).to(torch.int32)

    forward = experts_forward(module, names, module.forward)
    assert isinstance(forward, SortedForward if implementation == "grouped_mm" else OwnForward)
    output = forward(weights, x_ND, ends_J, slot_N)

    module.config._experts_implementation = "eager"
    expected = module(x_ND, slot_N.unsqueeze(-1), torch.ones(x_ND.shape[0], 1))
    torch.testing.assert_close(output, expected)
    ours = gradients(output, [x_ND, *weights])
    theirs = gradients(expected, [x_ND, *module.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_borrowed_module_gets_its_parameters_back_after_an_error() -> None:
    module = build("gated", "eager")
    before, names = dict(module._parameters), [name for name, _ in module.named_parameters()]
    held = []

    def fails(*args: Tensor) -> Tensor:
        held.extend([module.num_experts, module.gate_up_proj.shape[0]])
        raise ArithmeticError

    forward = OwnForward(module, names, fails)
    lent = [p[:2] for p in module.parameters()]
    with pytest.raises(ArithmeticError):
        forward(lent, torch.ones(2, HIDDEN), torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 1]))
    assert held == [2, 2]
    assert module.num_experts == SLOTS
    assert all(module._parameters[name] is p for name, p in before.items())
