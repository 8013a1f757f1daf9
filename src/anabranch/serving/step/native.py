"""The C++ step: the whole model in one call, on this machine's cores."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.serving import huge_pages
from anabranch.serving.decoder import Decoder, Experts
from anabranch.serving.native.library import Layer, Model, library
from anabranch.serving.native.library import Rows as NativeRows
from anabranch.serving.native.pack import BLOCK, in_runs, pack, pack_down, pack_gate_up, pad
from anabranch.serving.pools import FORMATS, KvShape
from anabranch.serving.step.base import Outputs, Rows
from anabranch.serving.step.draw import Draw
from anabranch.serving.store.arena import ExpertStore

MAX_HEAD_DIM = 512
# As model.h numbers them.
WEIGHTS = ("float32", "bfloat16", "int8")
PART = 128 * BLOCK  # outputs packed at once
# `AnabranchDraw`, and which setting each of its fields is.
DRAW = np.dtype(
    [("row", "i4"), ("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("min_p", "f4"), ("penalty", "f4"),
     ("seen_count", "i4"), ("seen", "u8"), ("u", "f8")], align=True,
)  # fmt: skip
DRAW_SETTINGS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty": "repetition_penalty",
}  # fmt: skip


class NativeStep:
    """Packs a decoder's weights, which it then owns, and runs steps on `threads` threads.

    weights: "float32", "bfloat16" or "int8" (a scale for each output). What is multiplied with them is fp32 for
    float32 and bf16 else; sums, norms, softmax and the residual stream are fp32 always. pools: uint8 pages by
    format, as `pools.allocate` makes them. store: of the experts that `decoder` has no weights of. weighing: whether
    outputs tell the attention of each page; the caller's to set. Raises ConfigError for a model whose sizes it cannot
    compute, and BuildError without a compiler.
    """

    name = "native"
    # None until it is open, and after it is closed.
    _handle: int | None = None

    def __init__(
        self,
        decoder: Decoder,
        weights: str,
        pools: dict[str, Tensor],
        positions: int,
        threads: int,
        store: ExpertStore | None = None,
    ) -> None:
        self._handle: int | None = None
        _check(decoder, weights)
        self.vocab, self.routing, self.weighing = decoder.vocab, False, False
        self._top_k = max(layer.experts.top_k for layer in decoder.layers)
        self._routers = [i for i, layer in enumerate(decoder.layers) if layer.experts.router_ED is not None]
        self.kv_shape = KvShape(len(decoder.layers), decoder.kv_heads, decoder.head_dim)
        self._library, self._weights, self.store = library(), weights, store
        self._kept: list[Tensor] = []
        self._pools = pools
        self._pointers = (c_void_p * len(FORMATS))(
            *(pools[kind].data_ptr() if kind in pools else None for kind in FORMATS)
        )
        self._pages = (c_int32 * len(FORMATS))(*(len(pools.get(kind, ())) for kind in FORMATS))
        self._layers = (Layer * len(decoder.layers))(
            *(self._layer(decoder, i) for i in range(len(decoder.layers)))
        )
        model = self._model(decoder, positions)
        if store is not None:
            model.store = ctypes.pointer(store.claim(self.weight_bytes))
        self._handle = self._library.anabranch_open(ctypes.byref(model), threads)
        self._logits_WV = torch.empty(0, pad(decoder.vocab, BLOCK))
        self._best_W = np.empty(0, dtype=np.int32)
        self._log_total_W = np.empty(0, dtype=np.float32)

    @property
    def weight_bytes(self) -> int:
        """Memory that the packed weights take."""
        return sum(tensor.nbytes for tensor in self._kept)

    def run(self, rows: Rows) -> Outputs:
        if not self._handle:
            raise ConfigError("the engine is closed; open another", setting="step")
        wanted = len(rows.want_W)
        if wanted > len(self._best_W):
            self._logits_WV = torch.empty(wanted, self._logits_WV.shape[1])
            self._best_W = np.empty(wanted, dtype=np.int32)
            self._log_total_W = np.empty(wanted, dtype=np.float32)
        layers, tokens = len(self._layers), len(rows.token_T)
        routed_LTK = np.empty((layers, tokens, self._top_k), dtype=np.int32) if self.routing else None
        stride, heads = rows.table_CP.shape[1], self.kv_shape.heads
        mass_TGP = np.zeros((tokens, heads, stride), dtype=np.float32) if self.weighing else None
        native = NativeRows(
            len(rows.token_T), wanted, int(rows.one_each), stride,
            rows.token_T.ctypes.data, rows.position_T.ctypes.data, rows.length_T.ctypes.data,
            rows.chain_T.ctypes.data, rows.table_CP.ctypes.data, rows.want_W.ctypes.data, self._pointers, self._pages,
            self._logits_WV.data_ptr(), self._best_W.ctypes.data, self._log_total_W.ctypes.data,
            *(None if asked is None else asked.ctypes.data for asked in (routed_LTK, mass_TGP)),
        )  # fmt: skip
        while damaged := self._library.anabranch_step(self._handle, ctypes.byref(native)):
            assert self.store is not None
            self.store.records.repair(damaged - 1)
            if mass_TGP is not None:
                mass_TGP.fill(0.0)
        if self.store is not None:
            self.store.after_step()
        return Outputs(
            self._logits_WV[:wanted, : self.vocab], self._best_W[:wanted], self._log_total_W[:wanted],
            None if routed_LTK is None else routed_LTK[self._routers],
            None if mass_TGP is None else mass_TGP.sum(1),
        )  # fmt: skip

    def draw(self, logits_WV: Tensor, draws: Sequence[Draw]) -> list[int]:
        asked, tokens = np.zeros(len(draws), dtype=DRAW), np.empty(len(draws), dtype=np.int32)
        seen = [np.array(draw.seen, dtype=np.int32) for draw in draws]
        asked["row"] = [draw.row for draw in draws]
        for name, of in DRAW_SETTINGS.items():
            asked[name] = [getattr(draw.sampling, of) for draw in draws]
        asked["seen"] = [ids.ctypes.data if ids.size else 0 for ids in seen]
        asked["seen_count"] = [ids.size for ids in seen]
        asked["u"] = [draw.uniform for draw in draws]
        self._library.anabranch_draw(
            self._handle, logits_WV.data_ptr(), logits_WV.stride(0), self.vocab, asked.ctypes.data, len(draws),
            tokens.ctypes.data,
        )  # fmt: skip
        return tokens.tolist()

    def rewrite(self, page: int, to: int) -> None:
        """Rewrite a full page in the format of page `to`."""
        shape = self.kv_shape
        sizes = shape.layers, shape.heads, shape.dim
        self._library.anabranch_rewrite(self._pointers, self._pages, *sizes, page, to)

    def close(self) -> None:
        if self._handle:
            self._library.anabranch_close(self._handle)
            self._handle = None
            self._kept.clear()
            if self.store is not None:
                self.store.close()

    def __del__(self) -> None:
        self.close()

    def _model(self, decoder: Decoder, positions: int) -> Model:
        cosines, sines = decoder.angles(positions)
        acts = torch.float32 if self._weights == "float32" else torch.bfloat16
        return Model(
            WEIGHTS.index(self._weights), len(decoder.layers), decoder.hidden, decoder.heads, decoder.kv_heads,
            decoder.head_dim, decoder.vocab, 2 * cosines.shape[1], int(decoder.normalise_top_k),
            int(decoder.qk_norm_all), decoder.eps, self._keep(decoder.embedding_VD.to(acts)),
            self._fp32(decoder.final_norm_D), self._packed(decoder.head_VD),
            self._fp32(cosines), self._fp32(sines), self._layers,
        )  # fmt: skip

    def _layer(self, decoder: Decoder, number: int) -> Layer:
        layer = decoder.layers.read(number)
        attention, experts = layer.attention, layer.experts
        wide = pad(attention.qkv_ND.shape[0], BLOCK)
        shared = experts.shared
        return Layer(
            self._fp32(layer.attention_norm_D), self._fp32(layer.mlp_norm_D), self._fp32(attention.q_norm),
            self._fp32(attention.k_norm), self._packed(attention.qkv_ND), self._fp32(attention.qkv_bias_N, wide),
            self._packed(attention.out_DN), self._fp32(attention.out_bias_D, pad(decoder.hidden, BLOCK)),
            None if experts.router_ED is None else self._keep(pack(experts.router_ED, "float32")),
            *self._expert_pair(experts), *((None, None) if shared is None else self._expert_pair(shared)),
            self._fp32(experts.shared_gate_D), experts.gate_up_EXD.shape[0], experts.top_k, _width(experts),
            0 if shared is None else _width(shared),
            0 if self.store is None or experts.router_ED is None else self.store.first_record(number),
        )  # fmt: skip

    def _expert_pair(self, experts: Experts) -> tuple[int | None, int | None]:
        if experts.gate_up_EXD.is_meta:
            return None, None
        gate_up = pack_gate_up(experts.gate_up_EXD, self._weights)
        down = in_runs(pack_down(experts.down_EDF, self._weights))
        return self._keep(gate_up), self._keep(down)

    def _packed(self, weight_NK: Tensor) -> int:
        """Packed part by part: a large matrix is never in memory thrice."""
        whole = pack(weight_NK.to("meta"), self._weights)
        kept = self._empty(whole.shape, whole.dtype)
        for at in range(0, len(weight_NK), PART):
            part = pack(weight_NK[at : at + PART], self._weights)
            kept[at // BLOCK : at // BLOCK + len(part)] = part
        return kept.data_ptr()

    def _fp32(self, tensor: Tensor | None, wide: int = 0) -> int | None:
        """Padded with zeros to `wide`."""
        if tensor is None:
            return None
        kept = torch.zeros(max(wide, tensor.numel())) if tensor.dim() == 1 else torch.empty(tensor.shape)
        kept.view(-1)[: tensor.numel()] = tensor.float().flatten()
        return self._keep(kept)

    def _keep(self, tensor: Tensor) -> int:
        """Its address, in a copy."""
        return self._empty(tensor.shape, tensor.dtype).copy_(tensor).data_ptr()

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        kept = huge_pages.empty(shape, dtype)
        self._kept.append(kept)
        return kept


def _width(experts: Experts) -> int:
    return pad(experts.down_EDF.shape[-1], BLOCK)


def _check(decoder: Decoder, weights: str) -> None:
    """Sizes that the packing and the registers want."""
    group_dim = decoder.heads // decoder.kv_heads * decoder.head_dim
    whole = weights != "int8" or (decoder.hidden % BLOCK == 0 and group_dim % BLOCK == 0)
    checks = (
        (
            f"multiples of {BLOCK} for int8: the hidden size, and the heads of a group by their dimension",
            whole,
        ),
        ("an even hidden size", decoder.hidden % 2 == 0),
        ("a head dimension that is a multiple of 16", decoder.head_dim % 16 == 0),
        (f"a head dimension of at most {MAX_HEAD_DIM}", decoder.head_dim <= MAX_HEAD_DIM),
    )
    for wanted, holds in checks:
        if not holds:
            raise ConfigError(f"the native step wants {wanted}; use step='torch'", setting="step")
