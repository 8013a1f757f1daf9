"""Peak memory of training on the fullest chip, for many layouts at once, by what the bytes are.

A peak is a stage of the pipeline at a moment: the loss on the last stage, or the backward of a layer. Each part below
is what it holds there. Counted are tensors, not what an allocator keeps around them, nor a framework's own buffers.

State: parameters with what `State` says of each. With tensor parallelism matrices are divided, while norms, routers
and down-projections to latents are whole on every rank. Activations: numbers that the blocks keep for backward
(`anabranch.workload.blocks`), for as many micro-batches as a stage holds: pp - stage of them under 1F1B (Narayanan et
al. 2021, arXiv:2104.04473), more when interleaved (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.columns import Column, LayoutColumns
from anabranch.workload.shape import KeptNumbers, ModelShape


class State(NamedTuple):
    """Bytes of one parameter: kept between steps as weight, gradient and optimizer's state; `compute` as products read
    it, which is what FSDP gathers."""

    weight: float
    gradient: float
    optimizer: float
    compute: float

    @property
    def total(self) -> float:
        return self.weight + self.gradient + self.optimizer


# Adam has two fp32 moments. MIXED: bf16 weights beside an fp32 master copy, gradients summed in fp32 (Megatron-LM).
# MASTER: what is sharded is the master copy itself, gathered in bf16 (FSDP2's mixed precision; `anabranch train`).
PLAIN = State(weight=4, gradient=4, optimizer=8, compute=4)
MIXED = State(weight=2, gradient=4, optimizer=12, compute=2)
MASTER = State(weight=4, gradient=4, optimizer=8, compute=2)

# Bytes of a logit at the loss: in the precision of the product, and in fp32 as the softmax that backward turns into
# the gradient in place (Megatron-LM's vocab-parallel cross entropy).
SOFTMAX_BYTES = 4.0
GATHERED_LAYERS = 2.0  # FSDP gathers the next layer while one computes
FULLEST_STAGES = 3  # the first, the second (its layers may be larger), the last


class MemoryParts(NamedTuple):
    """Bytes on the fullest chip at its peak, N each.

    weights: with FSDP also the gathered layers. activations: kept for backward, and the gradients in a layer. guests:
    weights of borrowed experts (the adaptive layer). exchange: rows on their way to experts and back.
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
        return np.sum(np.stack(self), axis=0)


def state_of(precision: str, layouts: LayoutColumns) -> tuple[State, State]:
    """Of layouts without and with FSDP."""
    return (PLAIN, PLAIN) if precision == "fp32" else (MIXED, MASTER)


def peak_memory(
    shape: ModelShape,
    layouts: LayoutColumns,
    precision: str,
    skew: Column | float = 1.0,
    guest_slots: int = 0,
    states: tuple[State, State] | None = None,
) -> MemoryParts:
    """Of each layout. skew: rows of the fullest expert rank over the mean. guest_slots: borrowed experts that a rank
    may hold in each MoE layer. states: without and with FSDP; of `precision` where not given."""
    plain, sharded = states or state_of(precision, layouts)
    number = 4.0 if precision == "fp32" else 2.0
    peaks = list[MemoryParts]()
    for place in range(FULLEST_STAGES):
        stage = np.minimum(float(place), layouts.pp - 1.0) if place < 2 else layouts.pp - 1.0
        held = _stage(shape, layouts, stage)
        kept = _kept(shape, layouts, held, stage, skew) * number
        inside = _inside(shape, layouts, held, skew) * number
        guests, lent = _guests(shape, layouts, held, stage, guest_slots, number)
        logits = _logits(shape, layouts, number) * held.last
        rows = _exchanged(shape, layouts, skew) * number * (held.moe > 0)
        state = _state(shape, layouts, held, plain, sharded)
        nothing = np.zeros_like(kept)
        peaks.append(MemoryParts(*state, kept, logits, guests, nothing))
        peaks.append(MemoryParts(*state, kept + inside, nothing, guests + lent, rows))
    return _largest(peaks)


def _largest(peaks: list[MemoryParts]) -> MemoryParts:
    """Of each layout the peak with the largest total."""
    where = np.argmax(np.stack([peak.total for peak in peaks]), axis=0)[None]
    return MemoryParts(
        *(np.take_along_axis(np.stack(part), where, 0)[0] for part in zip(*peaks, strict=True))
    )


class _Held(NamedTuple):
    """Of one stage: layers of each kind, and whether embedding (first) and head (last) are there, 0 or 1."""

    dense: Column
    moe: Column
    first: Column
    last: Column


def _stage(shape: ModelShape, layouts: LayoutColumns, stage: Column) -> _Held:
    """As `Layout.stage_layers` divides them: all alike, the first and the last up to a layer or two shorter."""
    kinds = np.zeros(shape.layers + shape.mtp)
    if shape.experts:
        kinds[list(shape.experts.layers)] = 1.0
        kinds[shape.layers :] = kinds[shape.layers - 1]
    before = np.concatenate([[0.0], np.cumsum(kinds)])
    count, stages = len(kinds), layouts.pp * layouts.vp
    short = np.mod(-count, stages)
    each, first = (count + short) / stages, np.minimum(1.0, short // 2)
    layers, moe = np.zeros_like(each), np.zeros_like(each)
    for chunk in range(int(layouts.vp.max())):
        place = chunk * layouts.pp + stage
        begin = _index(np.maximum(place * each - first, 0.0), count)
        end = _index((place + 1.0) * each - first, count)
        here = chunk < layouts.vp
        layers = layers + np.where(here, end - begin, 0)
        moe = moe + np.where(here, before[end] - before[begin], 0.0)
    ends = (stage == 0.0, stage == layouts.pp - 1.0)
    return _Held(layers - moe, moe, *(end.astype(float) for end in ends))


def _index(place: Column, count: int) -> NDArray[np.intp]:
    return np.minimum(np.rint(place), count).astype(np.intp)


def _in_flight(layouts: LayoutColumns, stage: Column) -> Column:
    """Micro-batches whose activations a stage holds at once; a fraction where chunks of layers interleave."""
    ahead = layouts.pp - stage - 1.0
    chunks = np.where(layouts.vp > 1, 2.0 * ahead + (layouts.vp - 1.0) * layouts.pp + 1.0, ahead + 1.0)
    return np.minimum(chunks, layouts.micro_batches * layouts.vp) / layouts.vp


# ------------------------------------------------------------------------------------------ state


class _Params(NamedTuple):
    """Parameters that one chip would hold without sharding over data: `shared` with every rank of the data-parallel
    group, `experts` with the ranks that have the same experts."""

    shared: Column
    experts: Column


def _layer_params(shape: ModelShape, layouts: LayoutColumns) -> tuple[Column, Column, Column]:
    """Of a layer's attention with its norms, of a dense feed-forward, of what stands beside experts."""
    tp, attention, hidden = layouts.tp, shape.attention, shape.hidden
    if attention.latent is None:  # key/value heads fewer than ranks are copied
        kv = 2.0 * attention.kv_heads * attention.head_dim * hidden
        block = (shape.attention_params - kv) / tp + kv / np.minimum(tp, attention.kv_heads)
    else:
        down = hidden * (
            (attention.latent.q_rank or 0) + attention.latent.kv_rank + attention.latent.rope_dim
        )
        block = (shape.attention_params - down) / tp + down
    norms = shape.norms.per_layer * shape.norm_params
    return block + norms, shape.dense_params / tp, shape.router_params + shape.shared_params / tp


def _params(shape: ModelShape, layouts: LayoutColumns, held: _Held) -> _Params:
    attention, dense, beside = _layer_params(shape, layouts)
    table = shape.vocab * shape.hidden
    # A tied head is the embedding, unless they are on different stages.
    tables = np.maximum(held.first, held.last) if shape.tied else held.first + held.last
    ends = (
        tables * table / layouts.tp
        + held.first * shape.positions * shape.hidden
        + held.last * shape.norm_params
    )
    join = held.last * shape.mtp * (2.0 * shape.hidden * shape.hidden / layouts.tp + 3.0 * shape.norm_params)
    layers = (held.dense + held.moe) * attention + held.dense * dense + held.moe * beside
    return _Params(layers + ends + join, held.moe * _experts(shape, layouts))


def _experts(shape: ModelShape, layouts: LayoutColumns) -> Column:
    """Parameters of one layer's experts on a rank, the fullest where they do not divide."""
    count = shape.experts.count if shape.experts else 0
    return np.ceil(count / layouts.ep) * shape.expert_params / layouts.etp


def _state(
    shape: ModelShape, layouts: LayoutColumns, held: _Held, plain: State, sharded: State
) -> tuple[Column, Column, Column]:
    """Weights, gradients, optimizer's state. FSDP's gathered layers are weights, their gradients before they are
    reduced gradients."""
    shared, experts = _params(shape, layouts, held)
    ranks, twins = layouts.dp * layouts.cp, layouts.edp
    full = layouts.fsdp > 0
    divided = np.maximum(layouts.divided, layouts.fsdp) > 0
    owned = shared / ranks + experts / twins
    own, whole = np.where(full, owned, shared + experts), np.where(divided, owned, shared + experts)
    unit = np.where(full & (ranks > 1), _unit(shape, layouts, held), 0.0)
    weights = own * np.where(full, sharded.weight, plain.weight) + unit * GATHERED_LAYERS * sharded.compute
    gradients = own * np.where(full, sharded.gradient, plain.gradient) + unit * sharded.compute
    return weights, gradients, whole * np.where(full, sharded.optimizer, plain.optimizer)


def _unit(shape: ModelShape, layouts: LayoutColumns, held: _Held) -> Column:
    """Parameters of the largest layer of a stage, as FSDP gathers them."""
    attention, dense, beside = _layer_params(shape, layouts)
    gathered = beside + np.where(layouts.edp > 1, _experts(shape, layouts), 0.0)
    return attention + np.maximum(dense * (held.dense > 0), gathered * (held.moe > 0))


# ------------------------------------------------------------------------------------- activations


def _tokens(layouts: LayoutColumns) -> Column:
    """Of one micro-batch that pass through a tensor-parallel group."""
    return layouts.micro_batch * layouts.seq_len / layouts.cp


def _rows(shape: ModelShape, layouts: LayoutColumns, skew: Column | float) -> Column:
    """(Token, expert) pairs that one chip computes, or a share 1 / etp of each."""
    top_k = shape.experts.top_k if shape.experts else 0
    return _tokens(layouts) / layouts.tp * top_k * layouts.etp * skew


def _layer_numbers(
    numbers: KeptNumbers, shape: ModelShape, layouts: LayoutColumns, skew: Column | float
) -> tuple[Column, Column]:
    """Numbers kept by a dense layer and by a layer with experts, of one micro-batch."""
    share = _tokens(layouts) / layouts.tp  # sequence parallelism divides what tensor parallelism does not
    attention = share * numbers.attention.total
    rows = _rows(shape, layouts, skew) * (numbers.row.wide + numbers.row.split / layouts.etp)
    return attention + share * numbers.dense.total, attention + share * numbers.moe.total + rows


def _kept(
    shape: ModelShape, layouts: LayoutColumns, held: _Held, stage: Column, skew: Column | float
) -> Column:
    """Numbers of all micro-batches in flight. The head's are those of the loss, apart from its logits."""
    whole = _layer_numbers(shape.kept_numbers("none"), shape, layouts, skew)
    inputs = _layer_numbers(shape.kept_numbers("full"), shape, layouts, skew)
    dense, moe = (np.where(layouts.full > 0, b, a) for a, b in zip(whole, inputs, strict=True))
    head = held.last * (1.0 + shape.mtp) * shape.kept_numbers("none").head.wide
    join = held.last * shape.mtp * shape.kept_numbers("none").mtp.total
    layers = (held.dense * dense + held.moe * moe) * _in_flight(layouts, stage)
    return layers + (head + join) * _tokens(layouts) / layouts.tp


def _inside(shape: ModelShape, layouts: LayoutColumns, held: _Held, skew: Column | float) -> Column:
    """Numbers beside the kept ones while a layer is in backward: gradients of its widest block, and under full
    recomputation all that the layer keeps."""
    share = _tokens(layouts) / layouts.tp
    dense = share * shape.dense.halves * shape.dense.width if shape.dense else np.zeros_like(share)
    moe = np.zeros_like(share)
    if shape.experts:
        unit = shape.experts.expert.halves * shape.experts.width
        moe = _rows(shape, layouts, skew) * unit / layouts.etp
    widest = np.maximum(dense * (held.dense > 0), moe * (held.moe > 0)) + 2.0 * share * shape.hidden
    whole = _layer_numbers(shape.kept_numbers("none"), shape, layouts, skew)
    again = np.maximum(whole[0] * (held.dense > 0), whole[1] * (held.moe > 0))
    return widest + np.where(layouts.full > 0, again, 0.0)


def _logits(shape: ModelShape, layouts: LayoutColumns, number: float) -> Column:
    """Bytes at the loss: every head's softmax is kept, of the last one its input too."""
    each = _tokens(layouts) * shape.vocab / layouts.tp
    return each * ((1.0 + shape.mtp) * SOFTMAX_BYTES + number)


def _guests(
    shape: ModelShape, layouts: LayoutColumns, held: _Held, stage: Column, slots: int, number: float
) -> tuple[Column, Column]:
    """Bytes of guests' weights, kept from forward to backward in every MoE layer, and what one layer's backward adds:
    their gradients, and the weights again where layers are recomputed."""
    one = slots * shape.expert_params / layouts.etp * (layouts.ep > 1) * number
    layers = held.moe * _in_flight(layouts, stage)
    return one * layers * (1.0 - layouts.full), one * (1.0 + layouts.full) * (held.moe > 0)


def _exchanged(shape: ModelShape, layouts: LayoutColumns, skew: Column | float) -> Column:
    """Numbers of a layer's rows on their way: a send and a receive buffer, where experts are on several ranks."""
    return 2.0 * _rows(shape, layouts, skew) * shape.hidden * (layouts.ep * layouts.etp > 1)
