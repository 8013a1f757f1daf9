"""The shape of a decoder-only transformer, dense or with experts, and what follows from it without any weights."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from anabranch.workload.blocks import FUSED, NOTHING, Attention, DenseFeedForward, Experts, Kept, Kernels

Recompute = Literal["none", "selective", "full"]


class Parts(NamedTuple):
    """Parameters by what they belong to, over all layers. Norms inside attention count as attention."""

    embedding: int
    positions: int
    head: int
    attention: int
    dense: int
    experts: int
    shared: int
    router: int
    norms: int
    mtp: int

    @property
    def total(self) -> int:
        return sum(self)


class Flops(NamedTuple):
    """Forward FLOPs of a token by part, over all layers. attention: scores and weighted values alone."""

    projections: float
    attention: float
    dense: float
    experts: float
    shared: float
    router: float
    head: float
    mtp: float

    @property
    def total(self) -> float:
        return sum(self)


class KeptNumbers(NamedTuple):
    """Numbers kept for backward by one block, a token; `row` is one (token, expert) pair's, so top_k of them.

    head: of the final norm, the output matrix and the loss (fp32 logits), once a model. mtp: of joining two streams
    before the block of one multi-token-prediction module; its attention, feed-forward and head come on top.
    """

    attention: Kept
    dense: Kept
    moe: Kept
    row: Kept
    head: Kept
    mtp: Kept


@dataclass(frozen=True)
class Norms:
    """Of a layer: 2, or 4 where outputs of the blocks are normed as well. bias: LayerNorm, not RMSNorm."""

    per_layer: int = 2
    bias: bool = False


RMS_NORMS = Norms()


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. Layers without experts have the `dense` feed-forward.

    mtp: multi-token-prediction modules (DeepSeek-V3, arXiv:2412.19437, section 2.2), used in training only. They share
    embedding and head with the model. positions: learned ones, 0 for rotary. dropout: on both blocks' outputs.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    attention: Attention
    dense: DenseFeedForward | None = None
    experts: Experts | None = None
    norms: Norms = RMS_NORMS
    tied: bool = False
    head_bias: bool = False
    positions: int = 0
    mtp: int = 0
    dropout: bool = False

    # ------------------------------------------------------------------------------- parameters

    @property
    def moe_layers(self) -> int:
        return len(self.experts.layers) if self.experts else 0

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers

    @property
    def attention_params(self) -> int:
        """Of one layer's attention."""
        return self.attention.params(self.hidden)

    @property
    def dense_params(self) -> int:
        """Of one dense feed-forward; 0 where no layer has one."""
        return self.dense.params(self.hidden) if self.dense else 0

    @property
    def expert_params(self) -> int:
        """Of one expert; 0 for a dense model."""
        return self.experts.expert.params(self.hidden) if self.experts else 0

    @property
    def shared_params(self) -> int:
        """Of one layer's shared experts and their gate."""
        return self.experts.shared_params(self.hidden) if self.experts else 0

    @property
    def router_params(self) -> int:
        """Of one layer's router."""
        return self.experts.router_params(self.hidden) if self.experts else 0

    @property
    def norm_params(self) -> int:
        """Of one norm on the residual stream."""
        return self.hidden * (2 if self.norms.bias else 1)

    @property
    def moe_params(self) -> int:
        """Of one MoE feed-forward: router, all experts, shared experts."""
        count = self.experts.count if self.experts else 0
        return self.router_params + count * self.expert_params + self.shared_params

    @property
    def mtp_params(self) -> int:
        """Of one multi-token-prediction module: a block like the last layer's, the matrix that joins two streams, and
        three norms."""
        feed_forward = self.moe_params if self._last_is_moe else self.dense_params
        join = 2 * self.hidden * self.hidden
        return self.attention_params + feed_forward + join + (self.norms.per_layer + 3) * self.norm_params

    @property
    def _last_is_moe(self) -> bool:
        return self.experts is not None and self.layers - 1 in self.experts.layers

    @property
    def params_by_part(self) -> Parts:
        """Exact. The head of a tied model is its embedding, counted once."""
        count = self.experts.count if self.experts else 0
        return Parts(
            embedding=self.vocab * self.hidden,
            positions=self.positions * self.hidden,
            head=(0 if self.tied else self.vocab * self.hidden) + (self.vocab if self.head_bias else 0),
            attention=self.layers * self.attention_params,
            dense=self.dense_layers * self.dense_params,
            experts=self.moe_layers * count * self.expert_params,
            shared=self.moe_layers * self.shared_params,
            router=self.moe_layers * self.router_params,
            norms=(self.layers * self.norms.per_layer + 1) * self.norm_params,
            mtp=self.mtp * self.mtp_params,
        )

    @property
    def params(self) -> int:
        """Of the model without its multi-token-prediction modules, as transformers builds it and as it is named."""
        parts = self.params_by_part
        return parts.total - parts.mtp

    @property
    def active_params(self) -> int:
        """`params` without the experts that a token does not choose."""
        idle = self.experts.count - self.experts.top_k if self.experts else 0
        return self.params - self.moe_layers * idle * self.expert_params

    # ------------------------------------------------------------------------------------ FLOPs

    def forward_flops(self, seq: int) -> Flops:
        """Of one token, the causal mean over a sequence of `seq` tokens."""
        projections, attention = 2.0 * self.attention.weights(self.hidden), self._core_flops(seq)
        head = 2.0 * self.vocab * self.hidden
        dense = 2.0 * self.dense.weights(self.hidden) if self.dense else 0.0
        experts = shared = router = 0.0
        if self.experts:
            experts = 2.0 * self.experts.top_k * self.experts.expert.weights(self.hidden)
            shared = 2.0 * self.experts.shared_weights(self.hidden) if self.experts.shared_width else 0.0
            router = 2.0 * self.experts.count * self.hidden
        moe, full = self.moe_layers, self.attention.core_flops(self.attention.context(seq, windowed=False))
        feed_forward = experts + shared + router if self._last_is_moe else dense
        join = 4.0 * self.hidden * self.hidden
        return Flops(
            projections=self.layers * projections,
            attention=attention,
            dense=self.dense_layers * dense,
            experts=moe * experts,
            shared=moe * shared,
            router=moe * router,
            head=head,
            mtp=self.mtp * (join + projections + full + feed_forward + head),
        )

    def _core_flops(self, seq: int) -> float:
        attention, windowed = self.attention, len(self.attention.windowed)
        wide = attention.core_flops(attention.context(seq, windowed=False))
        narrow = attention.core_flops(attention.context(seq, windowed=True))
        return (self.layers - windowed) * wide + windowed * narrow

    # ----------------------------------------------------------------------------------- memory

    def kv_bytes_per_token(self, number_bytes: float) -> float:
        """Bytes that one token caches in all layers, before a window forgets it."""
        return self.layers * self.attention.kv_numbers * number_bytes

    def kv_tokens(self, seq: int) -> float:
        """Tokens of a chain of `seq` that a layer still caches, the mean over layers: windowed ones hold at most
        their window. Times `kv_bytes_per_token` it is what the chain holds."""
        windowed, window = len(self.attention.windowed), self.attention.window
        held = seq if window is None else min(seq, window)
        return ((self.layers - windowed) * seq + windowed * held) / self.layers

    def kept_numbers(self, recompute: Recompute, kernels: Kernels = FUSED) -> KeptNumbers:
        """What forward keeps for backward (`anabranch.workload.blocks` names the sources).

        "selective" recomputes the core of attention. With a flash kernel that saves nothing: it keeps no scores, and
        its inputs and output stay. "full" keeps a layer's input, counted with its attention.
        """
        hidden = self.hidden
        # LayerNorm is one kernel everywhere.
        norm = float(hidden) if self.norms.bias else kernels.norm(hidden)
        head = Kept(norm + hidden, kernels.fp32 * self.vocab)
        if recompute == "full":
            return KeptNumbers(Kept(float(hidden), 0.0), NOTHING, NOTHING, NOTHING, head, NOTHING)
        # A block's input passes a norm, its output perhaps another and perhaps dropout.
        around = norm * self.norms.per_layer / 2 + (0.5 * hidden if self.dropout else 0.0)
        experts = self.experts
        return KeptNumbers(
            attention=_wider(self.attention.kept(hidden, kernels), around),
            dense=_wider(self.dense.kept(hidden, kernels), around) if self.dense else NOTHING,
            moe=_wider(experts.kept(hidden, kernels), around) if experts else NOTHING,
            row=experts.kept_row(hidden, kernels) if experts else NOTHING,
            head=head,
            mtp=Kept(2.0 * norm + 2.0 * hidden, 0.0),
        )


def _wider(kept: Kept, by: float) -> Kept:
    return Kept(kept.wide + by, kept.split)
