"""Decoding at a few fixed shapes, each compiled once: what accelerators want, and Trainium insists on.

A step in which every chain has one row, which is every step once prompts are in, is padded to the next of a few sizes:
of rows, and of pages a chain. Steps with prompts or guesses in them run as `TorchStep` runs them.

Shape suffixes: S slots, P pages of a slot, L layers, H heads, G key-value heads, D head dimension, N tokens of P
pages and one, V vocabulary.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf
from transformers import AttentionInterface, PreTrainedModel

from anabranch.integrations.routers import experts_modules
from anabranch.scheduling.pages import pages_of
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.pools import KvShape
from anabranch.serving.step.base import Outputs, Rows
from anabranch.serving.step.torch_step import PLACE_IN_POOL, TorchStep, require_plain_scores

NAME = "anabranch_slots"
BACKEND = "inductor"
# From one size to the next: up to so many times the work of a step is on rows and pages that only fill it up.
GROWTH = 4
LEAST_PAGES = 4


class Slots(NamedTuple):
    """What attention reads in a step: pages of each row, of which the first cached_S tokens count."""

    keys: Tensor  # as in `Paged`
    values: Tensor
    page_SP: Tensor
    cached_S: Tensor


class Decoded(NamedTuple):
    """What a graph gives. It writes no page: torch would copy a pool that a graph changes."""

    logits_SV: Tensor
    key_SLGD: Tensor
    value_SLGD: Tensor


def sizes(least: int, most: int) -> list[int]:
    """least, and each next one GROWTH times larger, up to `most`, which is the last."""
    found = [min(least, most)]
    while found[-1] < most:
        found.append(min(found[-1] * GROWTH, most))
    return found


class CompiledStep(TorchStep):
    """`TorchStep`, with decoding compiled: at most one graph for each pair of sizes that occurs.

    Experts are computed by transformers' `batched_mm`, whose shapes do not depend on the routing.
    """

    name = "compiled"

    def __init__(
        self, model: PreTrainedModel, kv_shape: KvShape, pools: dict[str, Tensor], limits: Limits
    ) -> None:
        super().__init__(model, kv_shape, pools)
        self.rows, self.pages = sizes(1, limits.slots), sizes(LEAST_PAGES, pages_of(limits.tokens))
        AttentionInterface.register(NAME, slot_attention)
        self._compiled = torch.compile(self._decode, backend=BACKEND, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run(self, rows: Rows) -> Outputs:
        # Who watches the routing does so by hooks, which a graph has none of.
        if not rows.one_each or self.routing:
            return super().run(rows)
        experts = self.model.config._experts_implementation if experts_modules(self.model) else None
        if experts is not None:
            self.model.set_experts_implementation("batched_mm")
        try:
            with self.attending_by(NAME), self._room_for_graphs():
                decoded: Decoded = self._compiled(*self._inputs(rows))
        finally:
            if experts is not None:
                self.model.set_experts_implementation(experts)
        self._write(rows, decoded)
        return self.outputs(decoded.logits_SV[self.on_device(rows.want_W)].float(), [])

    def _decode(self, token_S: Tensor, position_S: Tensor, slots: Slots) -> Decoded:
        own: list[tuple[Tensor, Tensor]] = []
        out: Any = self.model(
            input_ids=token_S[None], position_ids=position_S[None], use_cache=False, slots=slots, own=own
        )
        keys, values = zip(*own, strict=True)
        return Decoded(out.logits[0], torch.stack(keys, 1), torch.stack(values, 1))

    def _inputs(self, rows: Rows) -> tuple[Tensor, Tensor, Slots]:
        """What fills a size up is the first row once more; nobody reads it."""
        count, cached_T = len(rows.token_T), rows.length_T - 1
        filled = np.zeros(next(size for size in self.rows if size >= count), dtype=np.int64)
        filled[:count] = np.arange(count)
        pages = next(size for size in self.pages if size >= pages_of(int(cached_T.max())))
        page_SP = rows.table_CP[rows.chain_T[filled], :pages] & PLACE_IN_POOL
        slots = Slots(self.keys, self.values, self.on_device(page_SP), self.on_device(cached_T[filled]))
        return self.on_device(rows.token_T[filled]), self.on_device(rows.position_T[filled]), slots

    def _write(self, rows: Rows, decoded: Decoded) -> None:
        page_T, place_T = self.places(rows)
        count = len(rows.token_T)
        self.keys[page_T, :, :, :, place_T] = decoded.key_SLGD[:count].to(self.keys.dtype)
        self.values[page_T, :, :, place_T] = decoded.value_SLGD[:count].to(self.values.dtype)

    def _room_for_graphs(self) -> Any:
        """torch by itself stops compiling one function after 8 shapes."""
        return torch._dynamo.config.patch(recompile_limit=1 + len(self.rows) * len(self.pages))


def slot_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, slots: Slots,
    own: list[tuple[Tensor, Tensor]], **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention of one row a slot, to cached tokens and itself; its own key and value are put into `own`.

    query (1, H, S, D), key and value (1, G, S, D); gives (1, S, H, D).
    """
    require_plain_scores(more)
    key_SGD, value_SGD = key[0].transpose(0, 1), value[0].transpose(0, 1)
    own.append((key_SGD, value_SGD))
    key_SGND = slots.keys[slots.page_SP, module.layer_idx].permute(0, 2, 1, 4, 3).flatten(2, 3)
    value_SGND = slots.values[slots.page_SP, module.layer_idx].permute(0, 2, 1, 3, 4).flatten(2, 3)
    seen_SN = torch.arange(key_SGND.shape[2], device=query.device) < slots.cached_S[:, None]
    attended_SHD = nnf.scaled_dot_product_attention(
        query[0].transpose(0, 1).unsqueeze(2),
        torch.cat([key_SGND.to(query.dtype), key_SGD[:, :, None]], 2),
        torch.cat([value_SGND.to(query.dtype), value_SGD[:, :, None]], 2),
        attn_mask=nnf.pad(seen_SN, (0, 1), value=True)[:, None, None],
        scale=scaling,
        enable_gqa=True,
    ).squeeze(2)
    return attended_SHD.unsqueeze(0), None
