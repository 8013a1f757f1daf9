"""The roof of decoding."""

import pytest

from anabranch.costs.decode import DecodeShape, Roof, decode_bound
from anabranch.errors import ConfigError

SHAPE = DecodeShape(
    dense=20_000_000, expert=800_000, expert_layers=8, experts=16, top_k=4, kv_numbers=4096, attention=4096
)
ROOF = Roof(read_gbps=30.0, gflops=400.0)


def test_one_token_reads_its_own_experts_only() -> None:
    bound = decode_bound(SHAPE, ROOF, 1, 0, weight_bytes=2, kv_bytes=8192)
    assert bound.read_bytes == pytest.approx(2 * SHAPE.active)
    assert bound.flops == 2 * SHAPE.active
    assert bound.by == "memory" and bound.step_ms == pytest.approx(1e3 * bound.read_bytes / 30e9)


def test_many_tokens_read_every_expert_once_and_are_bound_by_compute() -> None:
    bound = decode_bound(SHAPE, ROOF, 512, 0, weight_bytes=2, kv_bytes=8192)
    assert bound.read_bytes == pytest.approx(2 * (20_000_000 + 16 * 800_000 * 8), rel=1e-6)
    assert bound.by == "compute" and bound.step_ms == pytest.approx(1e3 * bound.flops / 400e9)


def test_cached_tokens_cost_bytes_and_products() -> None:
    without, with_them = (decode_bound(SHAPE, ROOF, 1, n, weight_bytes=2, kv_bytes=8192) for n in (0, 1000))
    assert with_them.read_bytes - without.read_bytes == 1000 * 8192
    assert with_them.flops - without.flops == 4 * 4096 * 1000


def test_a_shared_prompt_is_read_once_and_attended_to_by_each() -> None:
    alone = decode_bound(SHAPE, ROOF, 8, 8000, weight_bytes=2, kv_bytes=8192)
    shared = decode_bound(SHAPE, ROOF, 8, 1000, weight_bytes=2, kv_bytes=8192, attended=8000)
    assert shared.flops == alone.flops and alone.read_bytes - shared.read_bytes == 7000 * 8192


def test_a_dense_model_has_no_experts_to_read() -> None:
    dense = DecodeShape(dense=10, expert=0, expert_layers=0, experts=0, top_k=0, kv_numbers=2, attention=1)
    assert dense.experts_read(5) == 0.0 and dense.active == 10


def test_a_roof_is_above_zero() -> None:
    with pytest.raises(ConfigError, match="gflops"):
        Roof(read_gbps=1.0, gflops=0.0)
