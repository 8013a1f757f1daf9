"""A parallel layout of a training run: which mesh, how much work a step, what is kept.

Attention and experts have meshes of their own over the same chips (MoE parallel folding, arXiv:2504.14960):
tp x cp x dp x pp for attention, etp x ep x edp x pp for experts.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from anabranch.errors import ConfigError
from anabranch.workload.shape import ModelShape, Recompute

Precision = Literal["bf16", "fp8", "fp4", "fp32"]
Shard = Literal["none", "optimizer", "full"]

CHOICES = {"recompute": get_args(Recompute), "precision": get_args(Precision), "shard": get_args(Shard)}
# Layers' places of the pipeline that embedding (one) and head (two at most) take where stages are otherwise uneven.
EMBEDDING_PLACES, HEAD_PLACES = 1, 2
MOST = 10**9  # of any field: products of two fit a 64-bit integer


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and the work of one step. Raises ConfigError naming a field that is out of range.

    tp: tensor, with sequence parallelism. pp: pipeline stages; vp: virtual stages a rank (interleaved). ep: experts;
    etp: tensor parallelism inside an expert. cp: context. dp: data. micro_batch and global_batch: sequences of
    `seq_len` tokens, for one dp rank's forward and for one step. precision: of matrix products. shard: what dp ranks
    divide, nothing, the optimizer's state (ZeRO-1), or parameters and gradients too (FSDP).
    """

    seq_len: int
    global_batch: int
    micro_batch: int = 1
    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    shard: Shard = "optimizer"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value: object = getattr(self, field.name)
            if field.name in CHOICES:
                if value not in CHOICES[field.name]:
                    raise ConfigError(
                        f"{value!r} is none of {', '.join(CHOICES[field.name])}", setting=field.name
                    )
            elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
                raise ConfigError(f"{value!r} must be a whole number from 1 to {MOST:,}", setting=field.name)

    @property
    def chips(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Ranks that hold the same share of the same experts; exact where `check` passes."""
        return self.chips // (self.pp * self.ep * self.etp)

    @property
    def micro_batches(self) -> int:
        """Of one dp rank in a step; exact where `check` passes."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Of one step, all ranks together."""
        return self.global_batch * self.seq_len

    def stage_layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Layers of each of the pp x vp stages in order, multi-token-prediction modules counted at the end.

        All alike, except that embedding and head may stand for a layer or two of the first and last stage where that
        makes the rest even, as Megatron-Core places them (126 layers on 64 stages: 1, 2, ..., 2, 1).
        Raises ConfigError naming `pp` where no such split exists.
        """
        stages, layers = self.pp * self.vp, shape.layers + shape.mtp
        short = -layers % stages
        first, each = min(EMBEDDING_PLACES, short // 2), (layers + short) // stages
        last = short - first
        if last > min(HEAD_PLACES, each):
            raise ConfigError(
                f"{layers} layers do not divide into pp x vp = {self.pp} x {self.vp} stages, embedding and head "
                f"counted as up to {EMBEDDING_PLACES + HEAD_PLACES} more: choose a divisor of {layers}",
                setting="pp",
            )
        sizes = [each] * stages
        sizes[0] -= first
        sizes[-1] -= last
        return tuple(sizes)

    def check(self, shape: ModelShape, chips: int | None = None) -> None:
        """Raises ConfigError naming the first field that does not fit the model, or `chips` where they are given."""
        if chips is not None and chips != self.chips:
            raise ConfigError(
                f"tp x pp x cp x dp = {self.tp} x {self.pp} x {self.cp} x {self.dp} = {self.chips} chips, "
                f"not the {chips} there are",
                setting="dp",
            )
        if self.vp > 1 and self.pp == 1:
            raise ConfigError("virtual stages need a pipeline: set vp to 1 or raise pp", setting="vp")
        self.stage_layers(shape)
        # Fewer key/value heads than ranks are copied, so each must serve a whole number of ranks.
        kv, heads = shape.attention.kv_heads, shape.attention.heads
        _divides("tp", self.tp, heads, f"{heads} attention heads")
        if shape.attention.kind == "gqa" and self.tp % kv:
            _divides("tp", self.tp, kv, f"{kv} key/value heads")
        if shape.dense:
            _divides("tp", self.tp, shape.dense.width, f"a feed-forward of width {shape.dense.width}")
        _divides("cp", self.cp * self.tp, self.seq_len, f"seq_len {self.seq_len}, by cp x tp")
        _divides("micro_batch", self.dp * self.micro_batch, self.global_batch,
                 f"global_batch {self.global_batch}, by dp x micro_batch")  # fmt: skip
        if self.vp > 1 and self.micro_batches % self.pp:
            raise ConfigError(
                f"interleaved stages take micro-batches in groups of pp = {self.pp}, not {self.micro_batches}: raise "
                "global_batch, or set vp to 1",
                setting="vp",
            )
        if shape.experts is None:
            for field in ("ep", "etp"):
                if getattr(self, field) != 1:
                    raise ConfigError("the model has no experts: set it to 1", setting=field)
            return
        shared = shape.experts.shared_width
        _divides("tp", self.tp, shared, f"shared experts of width {shared}")
        _divides("ep", self.ep, shape.experts.count, f"{shape.experts.count} experts")
        _divides("etp", self.etp, shape.experts.width, f"an expert of width {shape.experts.width}")
        ranks = self.chips // self.pp
        _divides("ep", self.ep * self.etp, ranks, f"the {ranks} ranks of a pipeline stage, by ep x etp")


def _divides(field: str, divisor: int, number: int, what: str) -> None:
    if number % divisor:
        raise ConfigError(f"{divisor} does not divide {what}", setting=field)
