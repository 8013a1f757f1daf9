"""Peak memory of training on the fullest chip, for many layouts at once, by what the bytes are.

A peak is a stage of the pipeline at a moment: at the loss, in the backward of the stage's last layer, when most
activations are there, or of its first, when most gradients are. Counted are tensors, not what an allocator keeps around
them, nor a framework's own buffers. With tensor parallelism matrices are divided, while norms, routers and
down-projections to latents are whole on every rank. A stage holds activations of pp - stage micro-batches under 1F1B
(Narayanan et al. 2021, arXiv:2104.04473), of more when interleaved (Korthikanti et al. 2022, arXiv:2205.05198, section
4.2.3). What is kept of each parameter and block says the `Stack`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.columns import Column, LayoutColumns
from anabranch.costs.training.stacks import Stack, megatron
from anabranch.workload.shape import ModelShape

FP32 = 4.0  # FSDP reduces gradients in fp32, from a buffer of their padded size
BLOCK = 8192  # layouts at once, so that their columns stay in a core's cache


class MemoryParts(NamedTuple):
    """Bytes on the fullest chip at its peak, N each.

    weights: with FSDP also gathered layers. gradients: with those of one layer before they are reduced. activations:
    kept for backward, and what the backward of a layer adds. guests: borrowed experts (the adaptive layer) and their
    gradients. exchange: rows on their way to experts and back.
    """

    weights: Column
    gradients: Column
    optimizer: Column
    activations: Column
    logits: Column
    guests: Column
    exchange: Column

    @property
    def total(self) -> Column:
        return sum(self[1:], self[0])


def peak_memory(
    shape: ModelShape,
    layouts: LayoutColumns,
    precision: str,
    skew: Column | float = 1.0,
    guest_slots: float = 0.0,
    stack: Stack | None = None,
) -> MemoryParts:
    """Of each layout. skew: rows of the fullest expert rank over the mean. guest_slots: borrowed experts that a rank
    holds in each MoE layer. stack: whose kernels; `megatron`'s where not given."""
    stack, count = stack or megatron(shape, precision), len(layouts.tp)
    skews = np.broadcast_to(np.asarray(skew, dtype=np.float64), count)
    blocks = list[MemoryParts]()
    for start in range(0, count, BLOCK):
        rows = slice(start, start + BLOCK)
        some = LayoutColumns(*(column[rows] for column in layouts))
        # The first stage, the second (its layers may be larger) and the last are candidates for the fullest.
        places = (np.zeros_like(some.pp), np.minimum(1.0, some.pp - 1.0), some.pp - 1.0)
        stages = (_Stage(shape, stack, some, place, skews[rows], guest_slots) for place in places)
        blocks.append(_largest([peak for stage in stages for peak in _peaks(stage)]))
    return MemoryParts(*(np.concatenate(part) for part in zip(*blocks, strict=True)))


def _largest(peaks: list[MemoryParts]) -> MemoryParts:
    """Of each layout the peak with the largest total."""
    where = np.argmax(np.stack([peak.total for peak in peaks]), axis=0)[None]
    return MemoryParts(
        *(np.take_along_axis(np.stack(part), where, 0)[0] for part in zip(*peaks, strict=True))
    )


class _Stage:
    """One stage of each layout. Parameters are those of a chip before they are sharded over data; `beside`: of one
    layer without its experts. Bytes are of one micro-batch: `layer` kept by a layer, `inside` by its feed-forward; of a
    stage that has layers with experts, one of those."""

    def __init__(
        self,
        shape: ModelShape,
        stack: Stack,
        layouts: LayoutColumns,
        place: Column,
        skew: Column,
        guests: float,
    ) -> None:
        self.shape, self.stack, self.layouts, self.place = shape, stack, layouts, place
        self.first = (place <= 0.0).astype(np.float64)
        self.last = (place >= layouts.pp - 1.0).astype(np.float64)
        self.layers, moe = _layers(shape, layouts, place)
        self.moe, self.has_moe = moe, moe > 0
        self.full, self.ranks = layouts.fsdp > 0, layouts.dp * layouts.cp
        self.fsdp = 1.0 * (self.full & (layouts.chips > 1))
        # Of a chip: sequence parallelism divides what tensor parallelism does not.
        self.tokens = layouts.micro_batch * layouts.seq_len / layouts.cp / layouts.tp
        top_k, count = (shape.experts.top_k, shape.experts.count) if shape.experts else (0, 0)
        self.rows = self.tokens * top_k * layouts.etp * skew  # computed here, or 1 / etp of each
        self.guest = guests * shape.expert_params / layouts.etp * (layouts.ep > 1) * stack.sharded.compute
        self._parameters(np.ceil(count / layouts.ep) * shape.expert_params / layouts.etp)
        row = self.rows * (stack.row.wide + stack.row.split / layouts.etp)
        kept = [self.tokens * (stack.attention.total + block.total) for block in (stack.dense, stack.moe)]
        self.whole = (self.layers - moe) * kept[0] + moe * (kept[1] + row)
        self.layer = np.where(self.has_moe, kept[1] + row, kept[0])
        self.inside = np.where(self.has_moe, row, self.tokens * stack.dense.split)

    def _parameters(self, experts: Column) -> None:
        shape, attention, tp = self.shape, self.shape.attention, self.layouts.tp
        if attention.latent is None:  # key/value heads fewer than ranks are copied
            kv = 2.0 * attention.kv_heads * attention.head_dim * shape.hidden
            block = (shape.attention_params - kv) / tp + kv / np.minimum(tp, attention.kv_heads)
        else:
            latent = attention.latent
            down = shape.hidden * ((latent.q_rank or 0.0) + latent.kv_rank + latent.rope_dim)
            block = (shape.attention_params - down) / tp + down
        block = block + shape.norms.per_layer * shape.norm_params
        dense, moe = block + shape.dense_params / tp, block + shape.router_params + shape.shared_params / tp
        # A tied head is the embedding, unless they are on different stages.
        self.table = shape.vocab * shape.hidden / tp
        tables = np.maximum(self.first, self.last) if shape.tied else self.first + self.last
        join = shape.mtp * (2.0 * shape.hidden**2 / tp + 3.0 * shape.norm_params)
        ends = tables * self.table + self.first * shape.positions * shape.hidden
        layers = (self.layers - self.moe) * dense + self.moe * moe
        self.shared = layers + ends + self.last * (join + shape.norm_params)
        self.experts, self.all_experts = experts * self.has_moe, experts * self.moe
        self.beside = np.where(self.has_moe, moe, dense)

    def owned(self, shared: Column, experts: Column) -> Column:
        """What sharding over data leaves of parameters."""
        return shared / self.ranks + experts / self.layouts.edp

    @property
    def in_flight(self) -> Column:
        """Micro-batches whose activations are held at once; a fraction where chunks of layers interleave."""
        layouts, ahead = self.layouts, self.layouts.pp - self.place - 1.0
        chunks = np.where(layouts.vp > 1, 2.0 * ahead + (layouts.vp - 1.0) * layouts.pp + 1.0, ahead + 1.0)
        return np.minimum(chunks, layouts.micro_batches * layouts.vp) / layouts.vp


def _layers(shape: ModelShape, layouts: LayoutColumns, place: Column) -> tuple[Column, Column]:
    """All layers of a stage, and those with experts, as `Layout.stage_layers` divides them: all stages alike, the first
    and the last up to a layer or two shorter."""
    kinds = np.zeros(shape.layers + shape.mtp)
    if shape.experts:
        kinds[list(shape.experts.layers)] = 1.0
        kinds[shape.layers :] = kinds[shape.layers - 1]
    before, count = np.concatenate([[0.0], np.cumsum(kinds)]), len(kinds)
    stages = layouts.pp * layouts.vp
    short = np.mod(-count, stages)
    each, first = (count + short) / stages, np.minimum(1.0, short // 2)
    layers, moe = np.zeros_like(each), np.zeros_like(each)

    def index(stage: Column) -> NDArray[np.intp]:
        return np.clip(np.rint(stage * each - first), 0, count).astype(np.intp)

    for chunk in range(int(layouts.vp.max())):
        begin, end = index(chunk * layouts.pp + place), index(chunk * layouts.pp + place + 1.0)
        here = chunk < layouts.vp
        layers, moe = layers + here * (end - begin), moe + here * (before[end] - before[begin])
    return layers, moe


class _Moment(NamedTuple):
    """What is there beside the state between steps, in bytes. gradients: all, where they come with backward."""

    gathered: Column
    gradients: Column
    activations: Column
    logits: Column | float = 0.0
    guests: Column | float = 0.0
    exchange: Column | float = 0.0


def _peaks(stage: _Stage) -> list[MemoryParts]:
    """The moments of a stage that may be its peak."""
    stack, layouts = stage.stack, stage.layouts
    owned, everything = stage.owned(stage.shared, stage.all_experts), stage.shared + stage.all_experts
    own = np.where(stage.full, owned, everything)
    divided = np.where(np.maximum(layouts.divided, layouts.fsdp) > 0, owned, everything)
    bytes_of = (np.where(stage.full, b, a) for a, b in zip(stack.plain, stack.sharded, strict=True))
    weight, gradient, adam, compute = bytes_of
    weights, gradients, optimizer = own * weight, own * gradient, divided * adam
    always, empty = gradients * stack.main_gradients, np.zeros_like(own)
    return [
        MemoryParts(weights + m.gathered, always + m.gradients, optimizer, m.activations, empty + m.logits,
                    empty + m.guests, empty + m.exchange)
        for m in _moments(stage, gradients, compute)
    ]  # fmt: skip


def _moments(stage: _Stage, gradients: Column, compute: Column) -> list[_Moment]:
    """The loss; the last layer's backward; where gradients come with it, the first layer's, and the embedding's."""
    stack, layouts, shape, full = stage.stack, stage.layouts, stage.shape, stage.full
    comes, tied, everything = not stack.main_gradients, shape.tied, stage.shared + stage.all_experts
    kept_stage = stage.fsdp * (layouts.pp > 1) * stack.whole_stages
    # FSDP keeps the head gathered from forward to backward.
    table, head = stage.first * stage.table, stage.last * stage.table
    held = np.where(kept_stage > 0, everything, head * (stack.tied_copies if tied else 1.0))
    tail = stage.fsdp * compute * held
    casts = stack.cast * (stage.shared - (not tied) * table)
    recomputed = stage.layers * stage.tokens * stack.layer_input
    kept = np.where(layouts.full > 0, recomputed, stage.whole) * stage.in_flight
    lent = stage.guest * (1.0 - layouts.full)
    # Of earlier micro-batches, whole where FSDP has not reduced them yet.
    whole = kept_stage + stage.fsdp * (layouts.micro_batches > 1) * stack.deferred > 0
    before = comes * np.where(whole, everything * FP32, gradients * (layouts.micro_batches > 1))
    logits = stage.last * stage.tokens * shape.vocab * stack.logit
    loss = kept + stage.last * stage.tokens * stack.head
    guests = lent * stage.moe * stage.in_flight
    # The head's gradient: reduced, beside the buffer it was reduced from; a tied one waits for the embedding's.
    head = comes * head * np.where(full, compute if tied else FP32 * (1.0 + 1.0 / stage.ranks), FP32)
    last = np.where(before > 0, before, head)
    moments = [_Moment(tail + casts, before, loss, logits, guests)]
    moments += _backward(stage, kept, last, tail + casts, guests, compute)
    if stack.main_gradients:
        return moments
    return [*moments, *_end(stage, kept, gradients, tail, lent * stage.has_moe, compute)]


def _end(
    stage: _Stage, kept: Column, gradients: Column, tail: Column, guests: Column, compute: Column
) -> list[_Moment]:
    """The first layer's backward, when the gradients of all others are there, and the embedding's."""
    stack, full, tied = stage.stack, stage.full, stage.shape.tied
    one = np.where(stage.layouts.full > 0, stage.tokens * stack.layer_input, stage.layer)
    table, ranks = stage.first * stage.table, np.where(full, stage.ranks, 1.0)
    owned = FP32 * table / ranks
    missing = FP32 * np.where(full, stage.owned(stage.beside, stage.experts), stage.beside + stage.experts)
    waiting = tied * table * np.where(full, compute, FP32)
    buffer = stage.fsdp * stage.beside * FP32  # of the layer before
    others = gradients - missing - owned + waiting + buffer
    embedding = np.where(full, table * (compute + FP32) - owned, tied * owned)
    rest = kept * (1.0 - 1.0 / stage.in_flight)
    return [
        *_backward(stage, kept - (stage.layers - 1.0) * one, others, tail, guests, compute),
        _Moment(tail, gradients + embedding, rest),
    ]


def _backward(
    stage: _Stage, kept: Column, gradients: Column, gathered: Column, guests: Column, compute: Column
) -> list[_Moment]:
    """The moments of one layer: its feed-forward's gate, where the gradients of both halves and of their product meet;
    its weights' gradients; their reduction by FSDP, experts first; the exchange of its rows."""
    stack, layouts, shape, has_moe = stage.stack, stage.layouts, stage.shape, stage.has_moe
    kept = kept + layouts.full * stage.layer
    dense = shape.dense.halves * shape.dense.width if shape.dense else 0.0
    row = shape.experts.expert.halves * shape.experts.width if shape.experts else 0.0
    unit = np.where(
        has_moe, stage.rows * row / layouts.etp * stack.row_number, stage.tokens * dense * stack.number
    )
    hidden: Column = (
        np.where(has_moe, stage.rows * stack.row_number, stage.tokens * stack.number) * shape.hidden
    )
    outputs = (
        has_moe * stage.rows * (stack.row.wide - shape.hidden * stack.row_number)
    )  # read first, then freed
    feed_forward = np.where(has_moe, stage.experts, shape.dense_params / layouts.tp)
    made = compute * (stage.fsdp if stack.main_gradients else 1.0)
    layer, all_of_it = (stage.fsdp * compute * n for n in (stage.beside, stage.beside + stage.experts))
    current = gathered + layer + all_of_it  # and the layer before, which backward comes to next
    reduced = stage.fsdp * (FP32 + np.maximum(compute, FP32 / layouts.edp))
    lent = guests + stage.guest * (1.0 + layouts.full) * has_moe
    return [
        _Moment(current, gradients + made * feed_forward / 3.0, kept + unit - outputs, guests=lent),
        _Moment(
            current, gradients + made * feed_forward, kept - stage.inside + unit + 2.0 * hidden, guests=lent
        ),
        _Moment(gathered + layer, gradients + reduced * stage.experts, kept - stage.inside, guests=guests),
        _Moment(gathered, gradients + reduced * stage.beside, kept - stage.layer, guests=guests),
        _Moment(current, gradients, kept, guests=lent, exchange=stack.row_buffers * has_moe * hidden),
    ]
