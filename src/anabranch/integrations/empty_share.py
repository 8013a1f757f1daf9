"""A rank that owns no expert: six experts on four ranks make blocks of 2, 2, 2 and 0.

Its share of the experts is empty, and two libraries stumble over that.
- Loading: transformers (5.23) stacks an empty list where a checkpoint holds one tensor per expert, and indexes an
  empty list of slices where it holds one tensor for all. Both raise, and neither tensor is needed: the share is empty
  whatever the checkpoint says.
- Backward: FSDP2 (torch 2.13) cannot reduce an empty gradient (`_chunk_cat expects non-empty tensor`). Its ranks are
  alone (they share their experts with nobody), so there is nothing to reduce either.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import WeightConverter, WeightRenaming

Convert = Callable[..., dict[str, Any]]


def load_empty_shares() -> None:
    """Teach transformers' two loading rules to take an empty share for granted. Calling it again changes nothing."""
    for rule in (WeightConverter, WeightRenaming):
        if not hasattr(rule.convert, "takes_empty_shares"):
            rule.convert = _taking_empty_shares(rule.convert)


def _taking_empty_shares(convert: Convert) -> Convert:
    @functools.wraps(convert)
    def convert_or_empty(
        self: WeightConverter | WeightRenaming, layer_name: str, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # The name of a rule with several targets is that of the first.
        names = [layer_name.replace(self.target_patterns[0], target) for target in self.target_patterns]
        shares = [None if model is None else _empty_share(model, name) for name in names]
        if any(share is None for share in shares):
            return convert(self, layer_name, model=model, **kwargs)
        self.collected_tensors.clear()
        return dict(zip(names, shares, strict=True))

    convert_or_empty.takes_empty_shares = True  # type: ignore[attr-defined] - a mark on a function
    return convert_or_empty


def _empty_share(model: nn.Module, name: str) -> Tensor | None:
    """This rank's share of a sharded parameter, where it has no elements."""
    module_name, _, parameter = name.rpartition(".")
    try:
        tensor = model.get_submodule(module_name)._parameters.get(parameter)
    except AttributeError:  # a rule for a module that this model does not have
        return None
    if not isinstance(tensor, DTensor) or tensor._local_tensor.numel() > 0 or tensor.numel() == 0:
        return None
    return torch.empty(tensor._local_tensor.shape, dtype=tensor.dtype)


def bypass_sharding(experts: nn.Module, home: Sequence[Tensor]) -> list[Tensor]:
    """Stand-ins for a rank's empty parameters, whose gradients FSDP2 does not see.

    The parameters get an empty gradient all the same, once backward has passed: clipping and checkpoints walk over
    the gradients of all ranks alike. Returns the parameters themselves where there is nothing to bypass.
    """
    if not isinstance(experts, FSDPModule) or any(p.numel() > 0 for p in home):
        return list(home)
    return [_stand_in(experts, p) if p.requires_grad else p for p in home]


def _stand_in(experts: FSDPModule, parameter: Tensor) -> Tensor:
    leaf = parameter.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(lambda _: _give_empty_gradients(experts))
    return leaf


def _give_empty_gradients(experts: FSDPModule) -> None:
    for group in experts._get_fsdp_state()._fsdp_param_groups:
        for share in group.fsdp_params:
            parameter: Any = share.sharded_param
            if parameter.grad is None and parameter.requires_grad and parameter._local_tensor.numel() == 0:
                parameter.grad = torch.zeros_like(parameter)
