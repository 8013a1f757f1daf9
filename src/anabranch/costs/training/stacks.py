"""What implementations of training keep, in bytes: of a parameter, of a token in each block, of a logit at the loss.

`megatron` is of fused kernels, as `anabranch.workload.blocks` counts them. `transformers_modules` is of transformers'
own modules as `anabranch train` runs them: every tensor named below was found among those alive at the peak of a real
run (`anabranch bench memory`, docs/memory.md).
"""

from typing import Literal, NamedTuple

from anabranch.errors import ConfigError
from anabranch.workload.blocks import NOTHING, Kept
from anabranch.workload.shape import ModelShape


class State(NamedTuple):
    """Bytes of one parameter: as weight, gradient and optimizer's state between steps; `compute` as products read it,
    which is what FSDP gathers and what its gradient has before it is reduced."""

    weight: float
    gradient: float
    optimizer: float
    compute: float


# Adam has two fp32 moments. MIXED: bf16 weights beside an fp32 master copy, gradients summed in fp32 (Megatron-LM).
# MASTER: what is sharded is the master copy itself, gathered in bf16 (FSDP2's mixed precision).
PLAIN = State(weight=4, gradient=4, optimizer=8, compute=4)
MIXED = State(weight=2, gradient=4, optimizer=12, compute=2)
MASTER = State(weight=4, gradient=4, optimizer=8, compute=2)


class Stack(NamedTuple):
    """plain, sharded: without and with FSDP. attention, dense, moe, row: bytes that a block keeps, of a token or of a
    (token, expert) row. head, layer_input: of a token, at the loss and where layers are recomputed. logit: of one at
    the loss. number, row_number: of an activation inside of blocks, and of a row's. row_buffers: hidden numbers of a
    row on its way to experts. cast: of a matrix's parameter, what autocast keeps beside it until backward.

    main_gradients: one buffer for all gradients, always there (Megatron-LM); else they come with backward and go with
    the step. deferred: with FSDP, gradients of several micro-batches are summed whole and reduced after the last.
    whole_stages: FSDP in a pipeline keeps a stage's weights gathered and its gradients whole. tied_copies: how often
    FSDP gathers a head that is the embedding.
    """

    plain: State
    sharded: State
    attention: Kept
    dense: Kept
    moe: Kept
    row: Kept
    head: float
    layer_input: float
    logit: float
    number: float
    row_number: float
    row_buffers: float = 2.0
    cast: float = 0.0
    main_gradients: bool = True
    deferred: bool = False
    whole_stages: bool = False
    tied_copies: float = 1.0


def megatron(shape: ModelShape, precision: str) -> Stack:
    """Fused kernels: flash attention, SwiGLU, and a cross entropy whose fp32 softmax turns into the gradient in place.

    Multi-token-prediction modules have their own loss and their own softmax, kept until backward.
    """
    number, numbers = 4.0 if precision == "fp32" else 2.0, shape.kept_numbers("none")
    plain, sharded = (PLAIN, PLAIN) if precision == "fp32" else (MIXED, MASTER)
    heads = 1.0 + shape.mtp
    blocks = (Kept(k.wide * number, k.split * number) for k in numbers[:4])
    return Stack(
        plain, sharded, *blocks,
        head=(heads * numbers.head.wide + shape.mtp * numbers.mtp.total) * number,
        layer_input=shape.hidden * number, logit=heads * 4.0 + number, number=number, row_number=number,
    )  # fmt: skip


def torchtitan(shape: ModelShape, precision: str) -> Stack:
    """torchtitan: FSDP2 with `megatron`'s blocks, and torch's own cross entropy: log-softmax, its gradient and the
    gradient of the logits, all fp32. Gradients come and go with a step."""
    stack = megatron(shape, precision)
    return stack._replace(logit=12.0, main_gradients=False, whole_stages=True)


Mode = Literal["fp32", "mixed", "autocast"]


def has_known_modules(shape: ModelShape) -> bool:
    """Whether `transformers_modules` knows what this model keeps."""
    unusual = shape.norms.bias or shape.attention.latent or shape.positions or shape.mtp
    return not unusual and shape.norms.per_layer == 2


def transformers_modules(shape: ModelShape, mode: Mode) -> Stack:
    """transformers' modules with sdpa attention and grouped experts, and torch's cross entropy on fp32 logits.

    mode: "mixed" bf16 by FSDP2, or "autocast" on a single rank, where the residual stream, the norms and the experts
    (`grouped_mm` is not autocast) stay in fp32 and every product casts its input anew. Raises ConfigError for a
    model of other modules than RMSNorm, grouped-query attention with rotary positions and gated units.
    """
    attention, hidden, experts = shape.attention, shape.hidden, shape.experts
    if not has_known_modules(shape):
        raise ConfigError(f"what {shape.family}'s modules keep is not known", setting="model")
    # A norm keeps its input in fp32 (in fp32 and under autocast the residual stream itself), the normed input, and
    # the product that reads its output keeps that.
    normed, read = {"fp32": (4.0, 4.0), "mixed": (2.0, 2.0), "autocast": (4.0, 2.0)}[mode]
    number, row = {"fp32": (4.0, 4.0), "mixed": (2.0, 2.0), "autocast": (2.0, 4.0)}[mode]
    casts = 3.0 if mode == "autocast" else 1.0  # of queries, keys and values each
    halves = shape.dense.halves if shape.dense else experts.expert.halves if experts else 1
    pair = float(halves) if mode == "autocast" else 1.0

    def norm(reads: float) -> float:
        return hidden * (4.0 + normed + read * reads) + 4.0

    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    inside = (2.0 * q + 2.0 * kv) * number + 4.0 * attention.heads  # rotated, values, output; log-sums
    if attention.qk_norm != "none":
        inside += (q + kv) * (4.0 + number) + 4.0 * (attention.heads + attention.kv_heads)
    # First products, activation and, where gated, its product with the other half.
    dense = Kept(norm(pair), 2.0 * halves * shape.dense.width * number) if shape.dense else NOTHING
    moe = rows = NOTHING
    if experts:
        # fp32 scores, chosen weights in fp32 and int64 indices; of a row its place in two orders, and its input
        # and output.
        shared = 2.0 * halves * experts.shared_width * number + hidden * number * experts.shared_gate
        moe = Kept(norm(1.0) + 4.0 * experts.count + 12.0 * experts.top_k, shared)
        rows = Kept(2.0 * hidden * row + 32.0, 2.0 * halves * experts.width * row)
    return Stack(
        PLAIN, MASTER if mode == "mixed" else PLAIN, Kept(norm(casts), inside), dense, moe, rows,
        head=norm(1.0), layer_input=hidden * (2.0 if mode == "mixed" else 4.0), logit=12.0,
        number=number, row_number=row, row_buffers=3.0, cast=2.0 if mode == "autocast" else 0.0,
        main_gradients=False, deferred=True, tied_copies=2.0,
    )  # fmt: skip
