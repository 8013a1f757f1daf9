"""Placement planned before an update runs: its routing is known from the rollout, so nothing is forecast.

Shape suffixes: M micro-batches of a step, L layers with experts, R ranks of the expert-parallel group, E experts,
T tokens of a micro-batch, K experts a token, B sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anabranch.errors import ConfigError
from anabranch.integrations.transformers import adaptive_layers
from anabranch.placement.base import IntArray
from anabranch.transport.collectives import gather_counts


def batch_routing(routings: Sequence[Tensor], width: int, experts: int) -> Tensor:
    """(L, B * width, K): recorded routing (L, T, K) of sequences padded on the right to `width` tokens.

    Tokens that were not recorded, padding and a sequence's last, are dealt to the experts in turn, so that their load
    is even and known. Raises ConfigError for a sequence longer than `width`.
    """
    layers, _, top_k = routings[0].shape
    longest = max(routing.shape[1] for routing in routings)
    if longest > width:
        raise ConfigError(f"{longest} recorded tokens in a batch of width {width}", setting="routing")
    dealt_NK = torch.arange(len(routings) * width * top_k).remainder(experts).view(-1, top_k)
    ids_LBWK = dealt_NK.expand(layers, -1, -1).reshape(layers, len(routings), width, top_k).clone()
    for b, routing in enumerate(routings):
        ids_LBWK[:, b, : routing.shape[1]] = routing
    return ids_LBWK.flatten(1, 2)


def plan_ahead(model: PreTrainedModel, routings: Sequence[Tensor]) -> IntArray:
    """Plan every layer of the coming micro-batches, one routing (L, T, K) each, in the order of their forward passes.

    One all-gather tells the counts of all of them. The layers then neither gather counts nor plan in those passes;
    each checks that its routing is the one it was planned for, and raises PlanError where it is not: run them within
    `replay`. Passes without gradients between do not count. Collective, with as many micro-batches on every rank.
    Returns the planned counts, int64 (M, L, R, E). Raises ConfigError where the routing is not of this model.
    """
    layers = list(adaptive_layers(model).values())
    if not layers or any(ids_LTK.shape[0] != len(layers) for ids_LTK in routings):
        raise ConfigError(f"is not of the {len(layers)} adaptive layers of this model", setting="routing")
    experts = layers[0].homes.experts
    counts = [
        [torch.bincount(ids_TK.flatten().long(), minlength=experts) for ids_TK in ids_LTK]
        for ids_LTK in routings
    ]
    mine_MLE = torch.stack([torch.stack(of_micro) for of_micro in counts]).to(model.device)
    gathered_RN = gather_counts(mine_MLE.flatten(), layers[0].group).numpy().astype("int64")
    counts_MLRE = gathered_RN.reshape(-1, *mine_MLE.shape).transpose(1, 2, 0, 3)
    for layer, counts_MRE in zip(layers, counts_MLRE.swapaxes(0, 1), strict=True):
        layer.foresee(counts_MRE)
    return counts_MLRE
