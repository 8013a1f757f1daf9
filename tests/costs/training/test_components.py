"""Nominal seconds of a step: what must vanish, grow and shrink."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.costs.training.columns import columns_of
from anabranch.costs.training.components import Components, components
from anabranch.costs.training.setup import Setup, Software
from anabranch.hardware.catalog import load_catalog
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout

SHAPE = read_shape("Qwen3-30B-A3B")
CATALOG = load_catalog()
LAYOUT = Layout(seq_len=4096, global_batch=512, micro_batch=1, ep=16, dp=64)
SETUP = Setup(SHAPE, CATALOG.cluster("p5.48xlarge:8"), LAYOUT)


def parts(**changes):
    """Components of `SETUP` with fields of its layout changed, as floats."""
    setup = replace(SETUP, layout=replace(LAYOUT, **changes))
    return Components(*(float(part[0]) for part in components(columns_of([setup]))))


def test_products_take_the_models_flops_at_the_peak():
    flops = SHAPE.forward_flops(4096)
    tokens = 512 * 4096 / 64
    assert parts().experts == pytest.approx(3 * tokens * flops.experts / 989e12)
    linear = flops.projections + flops.dense + flops.shared + flops.router
    assert parts().linear == pytest.approx(3 * tokens * linear / 989e12)


def test_what_a_layout_does_not_have_costs_nothing():
    alone = parts(tp=1, pp=1, cp=1, ep=1)
    assert alone.tensor == alone.pipeline == alone.context == alone.exchange == alone.bubble == 0


def test_each_degree_costs_its_own_exchange():
    plain = parts()
    assert parts(tp=2, dp=32).tensor > plain.tensor
    assert parts(pp=2, dp=32).pipeline > 0 and parts(pp=2, dp=32).bubble == pytest.approx(1 / 16)
    assert parts(cp=2, dp=32).context > 0
    assert parts(ep=8).exchange < plain.exchange, "inside a node rows travel faster"


def test_recomputation_runs_forward_once_more():
    plain, again = parts(), parts(recompute="full")
    assert again.linear == pytest.approx(plain.linear * 4 / 3)
    assert again.head == plain.head, "the head is not recomputed"


def test_deduplicated_rows_cross_nodes_less_often():
    columns = [SETUP, replace(SETUP, software=Software(dispatcher="deduplicated"))]
    flat, once = components(columns_of(columns)).exchange
    assert once < 0.4 * flat, "8 choices over two nodes are at most 2 crossings"


def test_skew_lengthens_experts_and_exchange_alone():
    even = components(columns_of([SETUP]))
    skewed = components(columns_of([replace(SETUP, skew=1.5)]))
    for name in Components._fields:
        ratio = getattr(skewed, name) / np.maximum(getattr(even, name), 1e-30)
        expected = 1.5 if name in ("experts", "exchange", "rows") else 1.0
        assert getattr(even, name)[0] == 0 or ratio[0] == pytest.approx(expected), name


def test_many_setups_at_once_equal_each_alone():
    dense = Setup(read_shape("Llama-3.1-8B"), CATALOG.cluster("trn2.48xlarge:4"),
                  Layout(seq_len=8192, global_batch=256, tp=4, dp=16))  # fmt: skip
    both = components(columns_of([SETUP, dense]))
    for i, setup in enumerate((SETUP, dense)):
        one = components(columns_of([setup]))
        assert [part[i] for part in both] == pytest.approx([part[0] for part in one])


def test_fsdp_gathers_weights_in_every_micro_batch():
    once, often = parts(shard="optimizer"), parts(shard="full")
    assert often.data == pytest.approx(once.data * 3 * LAYOUT.micro_batches / 2)
