"""Routers and experts of a transformers model: what they chose, and how to have them choose it again.

Shape suffixes: L Mixture-of-Experts layers, T tokens of a micro-batch, E experts, K experts a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anabranch.errors import ConfigError

# What blocks of transformers call their router.
ROUTERS = ("gate", "router")


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The experts of each layer that has any, in order of layers. Called with (tokens, ids_TK, weights_TK)."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def router_modules(model: nn.Module) -> list[Any]:
    """The router of each layer that has experts, in order of layers.

    Raises ConfigError for a model whose routers are not modules of their own.
    """
    found: list[Any] = []
    for block in model.modules():
        if any(hasattr(child, "_is_expert_parallel") for child in block.children()):
            router = next((getattr(block, name) for name in ROUTERS if hasattr(block, name)), None)
            if not isinstance(router, nn.Module) or not hasattr(router, "top_k"):
                raise ConfigError(f"{type(block).__name__} has no router to replay", setting="model")
            found.append(router)
    return found


class _Chosen(TorchFunctionMode):
    """Has `topk` over all experts choose the given ones; negative ids leave a token's choice as it is."""

    def __init__(self, ids_TK: Tensor, experts: int) -> None:
        super().__init__()
        self.ids_TK, self.experts = ids_TK, experts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return found
        scores_TE: Tensor = args[0]
        if found[1].shape != self.ids_TK.shape or scores_TE.shape[-1] != self.experts:
            return found  # a choice of groups of experts
        ids_TK = torch.where(self.ids_TK < 0, found[1], self.ids_TK)
        return torch.return_types.topk((scores_TE.gather(-1, ids_TK), ids_TK))


@contextmanager
def replay(model: nn.Module, ids_LTK: Tensor) -> Iterator[None]:
    """Within it, routers choose `ids_LTK` and weigh them freshly, by their own code, so that gradients flow.

    ids_LTK: integers; T counts the tokens of the micro-batch row by row, padding included. A token whose ids are
    negative is routed as ever. Keep backward inside where activation checkpointing runs the forward again. Raises
    ConfigError where the layers or tokens are not those of the model or the batch.
    """
    routers = router_modules(model)
    if len(routers) != ids_LTK.shape[0]:
        raise ConfigError(
            f"routing of {ids_LTK.shape[0]} layers for a model that has {len(routers)} with experts",
            setting="routing",
        )
    before = [router.forward for router in routers]
    for router, forward, ids_TK in zip(routers, before, ids_LTK, strict=True):
        router.forward = _replaying(forward, ids_TK.long(), router.num_experts)
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def _replaying(forward: Callable[..., Any], ids_TK: Tensor, experts: int) -> Callable[..., Any]:
    def replayed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if tokens != ids_TK.shape[0]:
            raise ConfigError(
                f"routing of {ids_TK.shape[0]} tokens for a batch of {tokens}", setting="routing"
            )
        with _Chosen(ids_TK.to(hidden_states.device), experts):
            return forward(hidden_states, *args, **kwargs)

    return replayed
