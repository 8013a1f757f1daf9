"""The same step by transformers' own modules, on any device: the reference of the C++ step, and what runs without it.

The model computes everything but attention; attention reads and writes our pages through transformers'
`AttentionInterface`.

Shape suffixes: T rows of the step, C chains, P pages of a chain, H heads, G key-value heads, D head dimension,
N tokens of a chain, W wanted rows.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf
from transformers import AttentionInterface, PreTrainedModel

from anabranch.errors import ConfigError
from anabranch.integrations.routers import experts_modules
from anabranch.scheduling.pages import PAGE
from anabranch.serving.pools import FORMAT_SHIFT, KvShape
from anabranch.serving.step.base import Outputs, Rows
from anabranch.serving.step.draw import Draw, draw_by_torch

NAME = "anabranch_paged"
# Of a page's number: its one pool is of one format.
PLACE_IN_POOL = (1 << FORMAT_SHIFT) - 1
# What models of transformers ask attention for besides a scale and a mask, by name.
CHANGE_SCORES = ("block_indices", "indices", "position_bias", "s_aux", "sinks", "softcap")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Paged(NamedTuple):
    """What attention needs of a step. by_chain: for each chain its rows, its pages and their tokens."""

    keys: Tensor  # (pages, layers, G, D, 16)
    values: Tensor  # (pages, layers, G, 16, D)
    page_T: Tensor
    slot_T: Tensor
    by_chain: list[tuple[Tensor, Tensor, Tensor]]


class TorchStep:
    """Runs `model` as it is, weights shared. pools: one of float32 or bfloat16, on the model's device.

    Raises ConfigError for pools of other formats.
    """

    name = "torch"

    def __init__(self, model: PreTrainedModel, kv_shape: KvShape, pools: dict[str, Tensor]) -> None:
        if len(pools) != 1 or (kind := next(iter(pools))) not in DTYPES:
            raise ConfigError(
                "the torch step keeps keys and values in the precision that it computes in; leave this out",
                setting="kv_dtype",
            )
        self.model, self.vocab = model, model.config.get_text_config().vocab_size
        self.routing = False
        numbers = pools[kind].view(DTYPES[kind]).unflatten(1, (kv_shape.layers, -1)).unflatten(-1, (2, -1))
        self.keys = numbers[..., 0, :].unflatten(-1, (kv_shape.dim, PAGE))
        self.values = numbers[..., 1, :].unflatten(-1, (PAGE, kv_shape.dim))
        # Masked numbers are multiplied by zero, which NaN of untouched memory would survive.
        pools[kind].zero_()
        AttentionInterface.register(NAME, paged_attention)

    @torch.no_grad()
    def run(self, rows: Rows) -> Outputs:
        seen: list[Tensor] = []
        # Only now: the model may be trained between two steps.
        watched = experts_modules(self.model) if self.routing else []
        hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[1])) for m in watched]
        try:
            with self.attending_by(NAME):
                out: Any = self.model(
                    input_ids=self.on_device(rows.token_T).unsqueeze(0),
                    position_ids=self.on_device(rows.position_T).unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=self.on_device(rows.want_W),
                    paged=self._paged(rows),
                )
        finally:
            for hook in hooks:
                hook.remove()
        return self.outputs(out.logits[0].float(), seen)

    @contextmanager
    def attending_by(self, name: str) -> Generator[None]:
        """The model's attention is the registered one of this name."""
        before: Any = self.model.config._attn_implementation
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def outputs(self, logits_WV: Tensor, seen: list[Tensor]) -> Outputs:
        """seen: of each layer the experts of all rows, if anybody asked for them."""
        routed_LTK = torch.stack(seen).int().cpu().numpy() if seen else None
        return Outputs(
            logits_WV,
            logits_WV.argmax(-1).int().cpu().numpy(),
            logits_WV.logsumexp(-1).cpu().numpy(),
            routed_LTK,
        )

    def draw(self, logits_WV: Tensor, draws: Sequence[Draw]) -> list[int]:
        return draw_by_torch(logits_WV, draws)

    def close(self) -> None:
        """Nothing is held but the model, which is the caller's."""

    def places(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The page that each row's own token goes to, and its place there."""
        last_T = rows.length_T - 1
        page_T = rows.table_CP[rows.chain_T, last_T // PAGE] & PLACE_IN_POOL
        return self.on_device(page_T), self.on_device(last_T % PAGE)

    def _paged(self, rows: Rows) -> Paged:
        by_chain = []
        for chain in dict.fromkeys(rows.chain_T.tolist()):
            mine = (rows.chain_T == chain).nonzero()[0]
            length_T = rows.length_T[mine]
            pages = rows.table_CP[chain, : -(-int(length_T.max()) // PAGE)] & PLACE_IN_POOL
            by_chain.append((self.on_device(mine), self.on_device(pages), self.on_device(length_T)))
        return Paged(self.keys, self.values, *self.places(rows), by_chain)

    def on_device(self, array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.int64).to(self.keys.device)


def require_plain_scores(more: dict[str, Any]) -> None:
    """Raise ConfigError where a model asks attention, by `more` than we know, for other scores than q k."""
    asked = sorted(name for name in CHANGE_SCORES if more.get(name) is not None)
    if asked:
        raise ConfigError(f"its attention wants {', '.join(asked)}, not computed", setting="model")


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, paged: Paged,
    **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention over our pages. query (1, H, T, D), key and value (1, G, T, D); returns (1, T, H, D).

    Raises ConfigError for a model that changes scores. A sliding window is longer than any chain (`choose_step`).
    """
    require_plain_scores(more)
    layer = module.layer_idx
    keys, values = paged.keys[:, layer], paged.values[:, layer]
    keys[paged.page_T, :, :, paged.slot_T] = key[0].transpose(0, 1).to(keys.dtype)
    values[paged.page_T, :, paged.slot_T] = value[0].transpose(0, 1).to(values.dtype)
    out_THD = torch.empty(
        query.shape[2], query.shape[1], query.shape[3], dtype=query.dtype, device=query.device
    )
    for mine_T, pages_P, length_T in paged.by_chain:
        key_GND = keys[pages_P].permute(1, 0, 3, 2).flatten(1, 2).to(query.dtype)
        value_GND = values[pages_P].permute(1, 0, 2, 3).flatten(1, 2).to(query.dtype)
        seen_TN = torch.arange(key_GND.shape[1], device=query.device) < length_T[:, None]
        attended = nnf.scaled_dot_product_attention(
            query[:, :, mine_T],
            key_GND[None],
            value_GND[None],
            attn_mask=seen_TN,
            scale=scaling,
            enable_gqa=True,
        )
        out_THD[mine_T] = attended[0].transpose(0, 1)
    return out_THD.unsqueeze(0), None
