"""Blocks of a transformer layer: their parameters, forward FLOPs of a token, and the numbers that backward needs.

A FLOP count is of one token's forward pass; a multiply-add is two. Backward costs twice as much. Numbers are counted
a token, in the precision of the activations. What is kept for backward follows Korthikanti et al. 2022
(arXiv:2205.05198, section 4.1), with these differences: attention is a flash kernel (Dao 2023, arXiv:2307.08691), so
no matrix of sequence x sequence exists; gated units keep both halves of their first product; dropout masks (a byte,
so half a number) exist only where the model has dropout.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Kept(NamedTuple):
    """Numbers that a block keeps for backward, for each token (or row).

    wide: of the residual stream's width; ranks of one tensor-parallel group share them only with sequence
    parallelism. split: of heads, widths or vocabulary; tensor parallelism always divides them.
    """

    wide: float
    split: float

    @property
    def total(self) -> float:
        return self.wide + self.split


NOTHING = Kept(0.0, 0.0)


class Kernels(NamedTuple):
    """How forward is computed, as far as it changes what is kept.

    fused: RMSNorm and the gate of a feed-forward are one kernel each that keeps only its inputs, and the routing
    weight multiplies the activated product, as in Megatron-Core. Otherwise they are the pieces of transformers'
    modules: a norm keeps its input in fp32 and its normalised input, a gate its activated half, an expert its output.
    number_bytes: of an activation.
    """

    fused: bool = True
    number_bytes: float = 2.0

    @property
    def fp32(self) -> float:
        """Numbers that one in fp32 counts for."""
        return 4.0 / self.number_bytes

    def norm(self, size: float) -> float:
        """What an RMSNorm keeps beside its output."""
        return size if self.fused else (self.fp32 + 1.0) * size


FUSED = Kernels()


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): queries and keys/values through low ranks.

    q_rank: None where queries are projected directly. rope_dim: of a query, and of the one key all heads share.
    nope_dim: of a query or key without position. v_dim: of a value.
    """

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention, or latent attention where `latent` is set (`head_dim` is then nope + rope).

    qk_norm: norms of queries and keys with weights, "head" of one head's size that all heads share, "all" over all
    heads. sinks: one learned logit a head. windowed: indices of the layers whose tokens see at most `window` tokens;
    chunked: they see only tokens of their own chunk of `window`, not the last `window`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    latent: Latent | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    sinks: bool = False
    windowed: tuple[int, ...] = ()
    window: int | None = None
    chunked: bool = False

    @property
    def kind(self) -> Literal["gqa", "mla"]:
        return "gqa" if self.latent is None else "mla"

    @property
    def v_dim(self) -> int:
        return self.head_dim if self.latent is None else self.latent.v_dim

    def weights(self, hidden: int) -> int:
        """Parameters of its matrices: those that every token is multiplied with."""
        q, out = self.heads * self.head_dim, self.heads * self.v_dim * hidden
        if self.latent is None:
            return hidden * (q + 2 * self.kv_heads * self.head_dim) + out
        mla = self.latent
        queries = hidden * q if mla.q_rank is None else mla.q_rank * (hidden + q)
        down = hidden * (mla.kv_rank + mla.rope_dim)
        return queries + down + mla.kv_rank * self.heads * (mla.nope_dim + mla.v_dim) + out

    def params(self, hidden: int) -> int:
        """Of one layer, with biases, sinks and the norms inside attention."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        vectors = (hidden if self.out_bias else 0) + (self.heads if self.sinks else 0)
        if self.latent is not None:
            q_rank, mla = self.latent.q_rank or 0, self.latent
            biases = q_rank + mla.kv_rank + mla.rope_dim if self.qkv_bias else 0
            return self.weights(hidden) + vectors + biases + q_rank + mla.kv_rank
        norms = {"none": 0, "head": 2 * self.head_dim, "all": q + kv}[self.qk_norm]
        return self.weights(hidden) + vectors + norms + (q + 2 * kv if self.qkv_bias else 0)

    def context(self, seq: int, windowed: bool) -> float:
        """Tokens that a token sees, itself included: the causal mean over a sequence of `seq`."""
        window = self.window
        if not windowed or window is None or seq <= window:
            return (seq + 1) / 2
        if self.chunked:
            whole, rest = divmod(seq, window)
            return (whole * window * (window + 1) + rest * (rest + 1)) / 2 / seq
        return window - window * (window - 1) / 2 / seq

    def core_flops(self, context: float) -> float:
        """Scores and weighted values of one layer, for a token that sees `context` tokens."""
        return 2.0 * self.heads * (self.head_dim + self.v_dim) * context

    @property
    def kv_numbers(self) -> int:
        """Numbers that a layer caches of one token: keys and values, or the latent and the shared key."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    def kept(self, hidden: int, kernels: Kernels) -> Kept:
        """Input of the projections; queries, keys and values as the kernel reads them; its output, and its fp32
        log-sum a head; what the norms inside attention keep.

        The latents and the norms on them are whole on every rank: only what is up-projected has heads.
        """
        queries, heads = self.heads * self.head_dim, self.heads
        split = queries + heads * (self.v_dim + kernels.fp32)
        if self.latent is not None:
            latents = (self.latent.q_rank or 0) + self.latent.kv_rank
            return Kept(
                hidden + latents + kernels.norm(latents), split + heads * (self.head_dim + self.v_dim)
            )
        keys = self.kv_heads * self.head_dim
        norms = 0.0 if self.qk_norm == "none" else kernels.norm(queries + keys)
        return Kept(float(hidden), split + 2.0 * keys + norms)


@dataclass(frozen=True)
class DenseFeedForward:
    """Two matrices with an activation between, or three where `gated` (SwiGLU). bias: one after every matrix."""

    width: int
    gated: bool = True
    bias: bool = False

    @property
    def halves(self) -> int:
        """First products of a token: gate and up, or one."""
        return 2 if self.gated else 1

    def weights(self, hidden: int) -> int:
        return (self.halves + 1) * hidden * self.width

    def params(self, hidden: int) -> int:
        return self.weights(hidden) + (self.halves * self.width + hidden if self.bias else 0)

    def kept_inside(self, kernels: Kernels) -> float:
        """The first products, and the activated product that the last matrix reads."""
        pieces = 1.0 if self.gated and not kernels.fused else 0.0
        return (self.halves + 1.0 + pieces) * self.width

    def kept(self, hidden: int, kernels: Kernels) -> Kept:
        """Input of the first matrices, and what is inside."""
        return Kept(float(hidden), self.kept_inside(kernels))


@dataclass(frozen=True)
class Experts:
    """The experts of an MoE layer and what stands beside them.

    layers: indices of the layers that have experts. shared_width: of all shared experts together, 0 for none;
    shared_gate: a learned gate of one number before their output. router_bias: parameters of the router beside its
    matrix (a correction that the checkpoint keeps as a buffer is none).
    """

    count: int
    top_k: int
    width: int
    layers: tuple[int, ...]
    gated: bool = True
    bias: bool = False
    shared_width: int = 0
    shared_bias: bool = False
    shared_gate: bool = False
    router_bias: bool = False

    @property
    def expert(self) -> DenseFeedForward:
        return DenseFeedForward(self.width, self.gated, self.bias)

    @property
    def shared(self) -> DenseFeedForward:
        return DenseFeedForward(self.shared_width, self.gated, self.shared_bias)

    def shared_weights(self, hidden: int) -> int:
        return self.shared.weights(hidden) + (hidden if self.shared_gate else 0)

    def shared_params(self, hidden: int) -> int:
        if not self.shared_width:
            return 0
        return self.shared.params(hidden) + (hidden if self.shared_gate else 0)

    def router_params(self, hidden: int) -> int:
        return self.count * (hidden + self.router_bias)

    def kept(self, hidden: int, kernels: Kernels) -> Kept:
        """Of a token: the block's input, the router's fp32 scores and chosen weights, and what is inside the shared
        experts (their output too, where a gate multiplies it)."""
        scores = kernels.fp32 * (self.count + self.top_k)
        gate = hidden if self.shared_gate else 0
        return Kept(hidden + scores + gate, self.shared.kept_inside(kernels) if self.shared_width else 0.0)

    def kept_row(self, hidden: int, kernels: Kernels) -> Kept:
        """Of a row (a token at one of its experts): the dispatched input, what is inside the expert, and the output
        where the routing weight multiplies that."""
        return Kept(hidden * (1.0 if kernels.fused else 2.0), self.expert.kept_inside(kernels))
