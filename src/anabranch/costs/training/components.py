"""What a training step consists of, in seconds at full speed: products at the chip's peak, bytes at the bandwidth of
memory and links, launches at a nominal cost. `efficiency` tells what of that speed is reached.

Backward costs twice forward's FLOPs; full recomputation runs forward once more. Sequence parallelism goes with
tensor parallelism (Korthikanti et al. 2022, arXiv:2205.05198). Collectives are hierarchical: a level of the network
carries only what lower levels could not finish among themselves.
"""

from typing import NamedTuple

import numpy as np

from anabranch.costs.training.columns import LEVELS, ChipColumns, Column, Columns

HALF = 2.0  # bytes of an activation or a weight on the wire and in memory
# Nominal passes over memory of a token's numbers, forward and backward together: norms, residuals and rotary of the
# stream; activation, its product and their gradients in feed-forwards; copies of rows to and from experts.
STREAM_PASSES, UNIT_PASSES, ROW_PASSES, LOGIT_BYTES = 30.0, 10.0, 12.0, 16.0
ADAM_BYTES = 24.0  # of a parameter's update: fp32 weight, two moments, gradient, read and written
LAUNCH_S, MOE_LAUNCH_S, STEP_S = 1e-3, 4e-3, 0.05  # host time of a layer and micro-batch, and of a step
# Attention reaches its full speed only on long sequences: the length at which it has half of it.
HALF_SPEED_TOKENS = 8000.0
TRAINED_SHARE = 0.01  # parameters that have a gradient under LoRA


class Components(NamedTuple):
    """Seconds of a step on the busiest chip, N each; `bubble` is a share of the rest."""

    linear: Column
    experts: Column
    head: Column
    attention: Column
    stream: Column
    units: Column
    rows: Column
    expert_weights: Column
    logits: Column
    optimizer: Column
    tensor: Column
    exchange: Column
    data: Column
    context: Column
    pipeline: Column
    step: Column
    launch: Column
    moe_launch: Column
    bubble: Column


def components(columns: Columns) -> Components:
    """Of all setups. Follows one chip: tokens of its tensor and context group, layers of its stage."""
    model, chip, layout = columns.model, columns.chip, columns.layout
    again = 1.0 + layout.full / 3.0
    # Frozen weights have no weight gradient: a third of the FLOPs less.
    passes = 3.0 - columns.software.adapters
    tokens = layout.global_batch * layout.seq_len / layout.chips  # FLOPs of a token are spread over all chips
    stage_tokens = tokens * layout.tp  # that pass through one tensor-parallel rank, times its share of layers
    launches = layout.micro_batches * model.layers / layout.pp * again
    moe_launches = layout.micro_batches * model.moe_layers / layout.pp * again
    rare = np.where(layout.seq_len > 0, 1.0 + HALF_SPEED_TOKENS / layout.seq_len, 1.0)
    return Components(
        linear=tokens * (model.projections + model.dense + model.shared) * passes * again / chip.peak,
        experts=tokens * model.experts * passes * again * columns.skew / chip.peak,
        head=tokens * model.head * passes / chip.wide_peak,
        attention=tokens * model.attention * 3.0 * again * rare / chip.wide_peak,
        stream=tokens * model.hidden * model.layers * HALF * STREAM_PASSES * again / chip.memory,
        units=tokens * model.unit_numbers * HALF * UNIT_PASSES * again / chip.memory,
        rows=tokens * model.row_numbers * HALF * ROW_PASSES * columns.skew / chip.memory,
        expert_weights=_expert_weights(columns, again),
        logits=tokens * model.vocab * LOGIT_BYTES / chip.memory,
        optimizer=_optimizer(columns),
        tensor=_tensor(columns, stage_tokens),
        exchange=_exchange(columns, tokens * again),
        data=_data(columns),
        context=_context(columns, stage_tokens),
        pipeline=_pipeline(columns, tokens),
        step=np.full_like(tokens, STEP_S),
        launch=launches * LAUNCH_S,
        moe_launch=moe_launches * MOE_LAUNCH_S,
        bubble=(layout.pp - 1) / (layout.vp * layout.micro_batches),
    )


def _gather_s(chip: ChipColumns, sent: Column, stride: Column, members: Column) -> Column:
    """Seconds to gather (or reduce-scatter) `sent` bytes on each of `members` ranks that lie `stride` chips apart."""
    seconds, inside = np.zeros(np.broadcast_shapes(sent.shape, stride.shape, members.shape)), np.ones(1)
    for level in range(LEVELS):
        upto = _inside(chip, level, stride, members, inside)
        parts = upto / inside
        seconds = seconds + sent / inside * (1.0 - 1.0 / parts) / chip.level_bytes_NL[:, level]
        inside = upto
    return seconds


def _inside(chip: ChipColumns, level: int, stride: Column, members: Column, inside: Column) -> Column:
    """Members of a group that share a unit of `level` with one of them."""
    upto = np.minimum(np.maximum(chip.level_chips_NL[:, level] / stride, 1.0), members)
    return np.maximum(upto, inside)


def _tensor(columns: Columns, stage_tokens: Column) -> Column:
    """A gather and a scatter around attention and around the feed-forward, in forward and in backward."""
    layout, model = columns.layout, columns.model
    sent = stage_tokens * model.hidden * HALF * 8.0 * model.layers * (1.0 + layout.full / 2.0)
    return _gather_s(columns.chip, sent, np.ones_like(layout.tp), layout.tp)


def _exchange(columns: Columns, tokens: Column) -> Column:
    """Rows to their experts and back, in forward and backward; the slowest level of the network decides. The ranks
    that share an expert (etp) then gather each other's rows, and scatter the sums."""
    layout, model, chip = columns.layout, columns.model, columns.chip
    sent = tokens * model.hidden * HALF * 4.0 * model.moe_layers * columns.skew
    gathered = _gather_s(chip, sent * model.top_k * layout.etp, np.ones_like(layout.etp), layout.etp)
    seconds, inside = np.zeros(np.broadcast_shapes(sent.shape, layout.ep.shape)), np.ones(1)
    for level in range(LEVELS):
        units = layout.ep / inside
        away = 1.0 - 1.0 / units
        # k choices fall on this many different units, each equally likely.
        different = units * (1.0 - away**model.top_k)
        copies = np.where(columns.software.deduplicated > 0, np.minimum(different, model.top_k), model.top_k)
        upto = _inside(chip, level, layout.etp, layout.ep, inside)
        crossing = np.where(upto > inside, sent * copies * away / chip.level_exchange_NL[:, level], 0.0)
        seconds, inside = np.maximum(seconds, crossing), upto
    return seconds + gathered


def _data(columns: Columns) -> Column:
    """Gradients to their owners and weights back, once a step; with FSDP twice the weights every micro-batch."""
    layout, model = columns.layout, columns.model
    trained = np.where(columns.software.adapters > 0, TRAINED_SHARE, 1.0)
    dense = (model.dense_params + model.table_params) / (layout.tp * layout.pp)
    experts = model.expert_params / (layout.pp * layout.ep * layout.etp)
    often = np.where(layout.fsdp > 0, 3.0 * layout.micro_batches, 2.0) * HALF * trained
    own = _gather_s(columns.chip, dense * often, layout.tp, layout.dp * layout.cp)
    return own + _gather_s(columns.chip, experts * often, layout.ep * layout.etp, layout.edp)


def _optimizer(columns: Columns) -> Column:
    """Adam's reads and writes of a chip's share of the state, and of the weights it gets back."""
    layout, model = columns.layout, columns.model
    trained = np.where(columns.software.adapters > 0, TRAINED_SHARE, 1.0)
    dense = (model.dense_params + model.table_params) / (layout.tp * layout.pp)
    experts = model.expert_params / (layout.pp * layout.ep * layout.etp)
    state = dense / (layout.dp * layout.cp) + experts / layout.edp
    return (state * ADAM_BYTES + (dense + experts) * 3.0 * HALF) * trained / columns.chip.memory


def _expert_weights(columns: Columns, again: Column) -> Column:
    """Every expert's weights are read in each micro-batch's forward and twice in its backward."""
    layout, model = columns.layout, columns.model
    held = model.expert_params / (layout.pp * layout.ep * layout.etp)
    return layout.micro_batches * held * HALF * 3.0 * again / columns.chip.memory


def _context(columns: Columns, stage_tokens: Column) -> Column:
    """Keys and values of a layer pass around the context group, and their gradients."""
    layout, model = columns.layout, columns.model
    sent = stage_tokens * layout.cp * model.kv_numbers * HALF * 3.0 * model.layers / layout.tp
    return _gather_s(columns.chip, sent, layout.tp, layout.cp)


def _pipeline(columns: Columns, tokens: Column) -> Column:
    """Activations to the next stage and gradients back, once for each virtual stage."""
    layout, model, chip = columns.layout, columns.model, columns.chip
    sent = tokens * layout.pp * layout.vp * model.hidden * HALF * 2.0
    near = np.full(np.broadcast_shapes(sent.shape, layout.pp.shape), np.inf)
    span = 2.0 * layout.chips / layout.pp  # a stage and its neighbour
    for level in reversed(range(LEVELS)):
        near = np.where(span <= chip.level_chips_NL[:, level], chip.level_bytes_NL[:, level], near)
    return np.where(layout.pp > 1, sent / near, 0.0)
