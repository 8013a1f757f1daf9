"""Peaks of layouts: priced together as alone, smaller where less is asked, and of known parts."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.costs.training.columns import layout_columns
from anabranch.costs.training.memory import MemoryParts, peak_memory
from anabranch.costs.training.stacks import MIXED, PLAIN, megatron, torchtitan, transformers_modules
from anabranch.errors import ConfigError
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout

QWEN, LLAMA = read_shape("Qwen3-30B-A3B"), read_shape("Llama-3.1-8B")
DEEPSEEK = read_shape("DeepSeek-V3")
BASE = Layout(seq_len=4096, global_batch=256, dp=16, ep=8)
LAYOUTS = [
    BASE,
    replace(BASE, recompute="full"),
    replace(BASE, shard="full", micro_batch=2),
    replace(BASE, shard="none", dp=8, tp=2),
    replace(BASE, pp=4, vp=3, dp=4, tp=1),
    replace(BASE, pp=2, cp=2, dp=4, etp=2, ep=4),
]


def peaks(shape, layouts, precision="bf16", **settings) -> MemoryParts:
    return peak_memory(shape, layout_columns(layouts), precision, **settings)


def total(shape, layout, precision="bf16", **settings) -> float:
    return float(peaks(shape, [layout], precision, **settings).total[0])


@pytest.mark.parametrize("shape", [QWEN, DEEPSEEK, LLAMA], ids=lambda shape: shape.family)
@pytest.mark.parametrize("make", [megatron, torchtitan])
def test_layouts_are_priced_together_as_alone(shape, make):
    stack = make(shape, "bf16")
    many = LAYOUTS * 2000  # over several blocks
    together = np.stack(peaks(shape, many, stack=stack))
    alone = np.concatenate([np.stack(peaks(shape, [layout], stack=stack)) for layout in LAYOUTS], axis=1)
    np.testing.assert_array_equal(together, np.tile(alone, 2000))
    assert (together >= 0.0).all() and np.isfinite(together).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_asks_for_more_needs_more(layout):
    larger = replace(layout, micro_batch=2 * layout.micro_batch)
    narrow = replace(QWEN, vocab=64)  # the loss of a large vocabulary hides what the layers need
    assert total(QWEN, larger) > total(QWEN, layout)
    assert total(narrow, layout, skew=1.5) > total(narrow, layout)
    assert total(narrow, layout, guest_slots=2) > total(narrow, layout)
    assert total(QWEN, layout, "fp32") > total(QWEN, layout)


@pytest.mark.parametrize("stack", [megatron, torchtitan])
def test_shards_save_memory(stack):
    kinds = [replace(BASE, shard=shard) for shard in ("none", "optimizer", "full")]
    totals = peaks(LLAMA, kinds, stack=stack(LLAMA, "bf16")).total
    assert totals[0] > totals[1] > totals[2]
    degrees = [replace(BASE, shard="full", dp=dp, ep=1) for dp in (2, 4, 8, 16)]
    assert (np.diff(peaks(LLAMA, degrees, stack=stack(LLAMA, "bf16")).total) < 0).all()


def test_recomputation_saves_activations_and_nothing_else():
    kept, again = peaks(LLAMA, [BASE]), peaks(LLAMA, [replace(BASE, recompute="full")])
    assert float(again.activations[0]) < 0.2 * float(kept.activations[0])
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(kept, name)[0] == getattr(again, name)[0]


def test_state_of_one_chip_is_its_parameters():
    alone = Layout(seq_len=128, global_batch=1, shard="none")
    for precision, state in (("fp32", PLAIN), ("bf16", MIXED)):
        parts = peaks(LLAMA, [alone], precision)
        held = (parts.weights[0], parts.gradients[0], parts.optimizer[0])
        assert held == tuple(LLAMA.params * each for each in state[:3])


def test_the_optimizer_is_divided_between_ranks_that_hold_the_same():
    parts = peaks(QWEN, [BASE])
    experts = QWEN.params_by_part.experts
    assert parts.optimizer[0] == pytest.approx(12 * ((QWEN.params - experts) / 16 + experts / 8 / 2))
    assert parts.weights[0] == pytest.approx(2 * (QWEN.params - experts + experts / 8))


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages():
    """One stage of four has a quarter of the layers and four micro-batches of them, interleaved chunks some more."""
    flat, piped, chunked = (
        Layout(4096, 64, pp=pp, vp=vp, shard="none") for pp, vp in ((1, 1), (4, 1), (4, 2))
    )
    kept = [peaks(LLAMA, [layout]).activations[0] for layout in (flat, piped, chunked)]
    assert kept[1] == pytest.approx(kept[0], rel=0.1)
    assert kept[2] / kept[1] == pytest.approx(1.0 + 3 / 8, rel=0.02)


def test_logits_are_on_the_last_stage_alone():
    wide = replace(LLAMA, vocab=2_000_000)
    parts = peaks(wide, [Layout(4096, 64, pp=4, tp=2, shard="none")])
    assert parts.logits[0] == pytest.approx(4096 * 2_000_000 / 2 * 6.0)


def test_modules_that_were_not_measured_are_refused():
    with pytest.raises(ConfigError) as error:
        transformers_modules(DEEPSEEK, "fp32")
    assert error.value.setting == "model"
