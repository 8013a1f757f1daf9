"""Parameters and optimizer's state of `anabranch train`, to the byte, before anything is built.

FSDP2 divides each tensor by its first dimension and pads all shares to the largest; experts are divided between the
ranks that share them first. Adam (fused, fp32) keeps two moments of a rank's share and a count of steps a tensor.
"""

from typing import NamedTuple

from anabranch.errors import ConfigError
from anabranch.workload.blocks import DenseFeedForward
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape

NUMBER, STEPS = 4, 4  # bytes of an fp32 number, and of a tensor's count of steps


class Tensors(NamedTuple):
    """`times` parameters of `rows` x `columns` numbers. expert: the rows are experts."""

    rows: int
    columns: int
    times: int = 1
    expert: bool = False


class StateBytes(NamedTuple):
    """On the fullest rank, between steps; gradients as they are before the optimizer's step."""

    weights: int
    gradients: int
    optimizer: int


def unbuilt_state_bytes(shape: ModelShape, layout: Layout) -> StateBytes:
    """Raises ConfigError naming a degree that `anabranch train` does not have."""
    for name in ("tp", "pp", "cp", "etp"):
        if getattr(layout, name) != 1:
            raise ConfigError("anabranch train shards over dp and ep alone: set it to 1", setting=name)
    if layout.shard != ("full" if layout.dp > 1 else "none"):
        raise ConfigError("anabranch train shards everything between its ranks", setting="shard")
    numbers = tensors = 0
    for rows, columns, times, expert in tensors_of(shape):
        held, parts = (-(-rows // layout.ep), layout.edp) if expert else (rows, layout.dp)
        numbers += times * -(-held // parts) * columns
        tensors += times
    # A tied head's gradient is reduced apart from the embedding's, into a buffer that stays (transformers 5.24).
    again = -(-shape.vocab // layout.dp) * shape.hidden if shape.tied and layout.dp > 1 else 0
    return StateBytes(NUMBER * numbers, NUMBER * (numbers + again), 2 * NUMBER * numbers + STEPS * tensors)


def tensors_of(shape: ModelShape) -> list[Tensors]:
    """All parameters as transformers keeps them, some of them 0 times. Of a model that joins matrices of attention or
    of a dense feed-forward into one, only the padding may differ."""
    hidden, experts, moe = shape.hidden, shape.experts, shape.moe_layers
    norms = (shape.layers * shape.norms.per_layer + 1) * (1 + shape.norms.bias)
    found = [
        Tensors(shape.vocab, hidden, 1 if shape.tied else 2), Tensors(shape.vocab, 1, shape.head_bias),
        Tensors(shape.positions, hidden, shape.positions > 0), Tensors(hidden, 1, norms), *_attention(shape),
        *(_feed_forward(shape.dense, hidden, shape.dense_layers) if shape.dense else ()),
    ]  # fmt: skip
    if experts:
        count, first = experts.count, experts.expert.halves * experts.width
        found += [Tensors(count, size * hidden, moe, expert=True) for size in (first, experts.width)]
        found += [Tensors(count, size, moe * experts.bias, expert=True) for size in (first, hidden)]
        found += [
            Tensors(count, hidden, moe), Tensors(count, 1, moe * experts.router_bias),
            Tensors(1, hidden, moe * experts.shared_gate),
            *(_feed_forward(experts.shared, hidden, moe) if experts.shared_width else ()),
        ]  # fmt: skip
    return found


def _attention(shape: ModelShape) -> list[Tensors]:
    n, hidden, attention, latent = shape.layers, shape.hidden, shape.attention, shape.attention.latent
    heads, head_dim, bias = attention.heads, attention.head_dim, n * attention.qkv_bias
    q, kv = heads * head_dim, attention.kv_heads * head_dim
    output = [
        Tensors(hidden, heads * attention.v_dim, n), Tensors(hidden, 1, n * attention.out_bias),
        Tensors(heads, 1, n * attention.sinks),
    ]  # fmt: skip
    if latent is None:
        norms = {"none": (), "head": (head_dim, head_dim), "all": (q, kv)}[attention.qk_norm]
        products = [Tensors(q, hidden, n), Tensors(kv, hidden, 2 * n)]
        biases = [Tensors(q, 1, bias), Tensors(kv, 1, 2 * bias)]
        return output + products + biases + [Tensors(size, 1, n) for size in norms]
    down, rank = latent.kv_rank + latent.rope_dim, latent.q_rank
    up = heads * (latent.nope_dim + latent.v_dim)
    keys = [Tensors(down, hidden, n), Tensors(latent.kv_rank, 1, n), Tensors(up, latent.kv_rank, n)]
    if rank is None:
        return [*output, *keys, Tensors(down, 1, bias), Tensors(q, hidden, n)]
    queries = [Tensors(rank, hidden, n), Tensors(rank, 1, n + bias), Tensors(q, rank, n)]
    return [*output, *keys, Tensors(down, 1, bias), *queries]


def _feed_forward(dense: DenseFeedForward, hidden: int, layers: int) -> list[Tensors]:
    first, bias = dense.halves * layers, layers * dense.bias
    weights = [Tensors(dense.width, hidden, first), Tensors(hidden, dense.width, layers)]
    return [*weights, Tensors(dense.width, 1, first * dense.bias), Tensors(hidden, 1, bias)]
