"""The experts' computation on rows already sorted by slot.

The mathematics is the model's own: `SortedForward` is the `grouped_mm` experts forward of transformers with its
sort taken out (our rows arrive sorted), built from the module's own gate, activation, biases and layout flags;
`OwnForward` calls the module's forward, whatever it is, with its parameters exchanged for the call.

Shape suffixes: N rows, J slots, D hidden size, F expert width, I and O input and output width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ExpertsForward(Protocol):
    """Runs the experts of `weights` (one tensor per parameter name, first dimension J) on sorted rows."""

    def __call__(
        self, weights: Sequence[Tensor], rows_ND: Tensor, ends_J: Tensor, slot_N: Tensor
    ) -> Tensor: ...


class SortedForward:
    """Two grouped matrix products around the module's own gate. Traceable; no sort, no host synchronisation."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.module: Any = module  # its flags and gate are set by transformers' decorator
        self.names = tuple(names)

    def __call__(self, weights: Sequence[Tensor], rows_ND: Tensor, ends_J: Tensor, slot_N: Tensor) -> Tensor:
        module, named = self.module, dict(zip(self.names, weights, strict=True))
        up = "gate_up_proj" if module.has_gate else "up_proj"
        h_NF = self._linear(named, up, rows_ND, ends_J, slot_N)
        h_NF = module._apply_gate(h_NF) if module.has_gate else module.act_fn(h_NF)
        y_ND = self._linear(named, "down_proj", h_NF, ends_J, slot_N)
        return module.post_expert_norm(y_ND) if module.has_post_expert_norm else y_ND

    def _linear(
        self, named: dict[str, Tensor], name: str, x_NI: Tensor, ends_J: Tensor, slot_N: Tensor
    ) -> Tensor:
        weight_JIO = named[name] if self.module.is_transposed else named[name].transpose(-2, -1)
        y_NO = grouped_mm(x_NI.to(weight_JIO.dtype), weight_JIO, ends_J)
        if self.module.has_bias:
            y_NO = y_NO + named[f"{name}_bias"].index_select(0, slot_N)
        return y_NO


class OwnForward:
    """The module's own forward, called as top-1 with unit weights on a module that holds J experts for the call."""

    def __init__(self, module: nn.Module, names: Sequence[str], forward: Callable[..., Tensor]) -> None:
        self.module: Any = module
        self.names = tuple(names)
        self.forward = forward

    def __call__(self, weights: Sequence[Tensor], rows_ND: Tensor, ends_J: Tensor, slot_N: Tensor) -> Tensor:
        with self._holding(weights, ends_J.shape[0]):
            return self.forward(rows_ND, slot_N.unsqueeze(-1), rows_ND.new_ones((rows_ND.shape[0], 1)))

    @contextmanager
    def _holding(self, weights: Sequence[Tensor], slots: int) -> Iterator[None]:
        module = self.module
        before = {name: module._parameters[name] for name in self.names}
        experts = module.num_experts
        module._parameters.update(zip(self.names, weights, strict=True))
        module.num_experts = slots
        try:
            yield
        finally:
            module._parameters.update(before)
            module.num_experts = experts


def experts_forward(
    module: nn.Module, names: Sequence[str], forward: Callable[..., Tensor]
) -> ExpertsForward:
    """`SortedForward` where the module follows transformers' experts interface and runs `grouped_mm`; else its own."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    follows = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    if follows and implementation == "grouped_mm":
        return SortedForward(module, names)
    return OwnForward(module, names, forward)


def grouped_mm(x_NI: Tensor, weight_JIO: Tensor, ends_J: Tensor) -> Tensor:
    """(N, O): rows ends[j-1]:ends[j] times weight j. Differentiable in x and weight.

    `torch.nn.functional.grouped_mm` refuses to be traced except in bfloat16 (torch 2.13), so traced calls in
    other precisions go through an operator of ours that calls it.
    """
    if torch.compiler.is_compiling() and x_NI.dtype != torch.bfloat16:
        return torch.ops.anabranch.grouped_mm(x_NI, weight_JIO, ends_J)
    return nn.functional.grouped_mm(x_NI, weight_JIO, offs=ends_J)


@torch.library.custom_op("anabranch::grouped_mm", mutates_args=())
def _grouped_mm(x_NI: Tensor, weight_JIO: Tensor, ends_J: Tensor) -> Tensor:
    return nn.functional.grouped_mm(x_NI, weight_JIO, offs=ends_J)


@_grouped_mm.register_fake
def _(x_NI: Tensor, weight_JIO: Tensor, ends_J: Tensor) -> Tensor:
    return x_NI.new_empty((x_NI.shape[0], weight_JIO.shape[2]))


@torch.library.custom_op("anabranch::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(
    grad_NO: Tensor, x_NI: Tensor, weight_JIO: Tensor, ends_J: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x = nn.functional.grouped_mm(grad_NO, weight_JIO.transpose(-2, -1), offs=ends_J)
    grad_weight = nn.functional.grouped_mm(x_NI.t(), grad_NO, offs=ends_J)
    return grad_x, grad_weight


@_grouped_mm_backward.register_fake
def _(grad_NO: Tensor, x_NI: Tensor, weight_JIO: Tensor, ends_J: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NI), weight_JIO.new_empty(weight_JIO.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_NI, weight_JIO, ends_J = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.anabranch.grouped_mm_backward(
        grad_NO.contiguous(), x_NI, weight_JIO, ends_J
    )
    return grad_x, grad_weight, None


_grouped_mm.register_autograd(_backward, setup_context=_keep)
