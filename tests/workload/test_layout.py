"""A layout knows its meshes, and what does not divide is one error naming the field."""

import pytest

from anabranch.errors import ConfigError
from anabranch.workload.blocks import Attention, DenseFeedForward, Experts
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape

MOE = ModelShape(
    "qwen3_moe", 96, 64, 48, Attention(8, 4, 16), experts=Experts(12, 2, 36, tuple(range(48)))
)  # fmt: skip
DENSE = ModelShape("llama", 96, 64, 126, Attention(8, 4, 16), DenseFeedForward(112))
SHARED = Experts(12, 2, 36, (0, 1, 2, 3), shared_width=36)
RUN = {"seq_len": 128, "global_batch": 96}


def test_the_meshes_of_attention_and_experts_share_the_chips():
    layout = Layout(**RUN, micro_batch=2, tp=4, pp=2, cp=2, dp=3, ep=6, etp=2)
    layout.check(MOE, 48)
    assert layout.chips == 48
    assert layout.edp * layout.etp * layout.ep * layout.pp == layout.chips
    assert layout.micro_batches == 16
    assert layout.tokens == 96 * 128


@pytest.mark.parametrize(
    ("pp", "vp", "first", "each", "last"),
    [(9, 2, 7, 7, 7), (16, 4, 1, 2, 1), (16, 8, 0, 1, 0), (127, 1, 1, 1, 0), (43, 1, 2, 3, 1)],
)
def test_embedding_and_head_stand_for_layers_that_a_split_lacks(pp, vp, first, each, last):
    stages = Layout(**RUN, pp=pp, vp=vp).stage_layers(DENSE)
    assert stages == (first, *[each] * (pp * vp - 2), last)
    assert sum(stages) == DENSE.layers


@pytest.mark.parametrize(
    ("setting", "shape", "layout"),
    [
        ("pp", DENSE, {"pp": 100}),
        ("pp", DENSE, {"pp": 10}),
        ("vp", DENSE, {"vp": 2}),
        ("vp", DENSE, {"pp": 9, "vp": 2}),
        ("tp", DENSE, {"tp": 3}),
        ("tp", ModelShape("llama", 96, 64, 4, Attention(12, 4, 16)), {"tp": 6}),
        ("tp", ModelShape("llama", 96, 64, 4, Attention(8, 4, 16), DenseFeedForward(44)), {"tp": 8}),
        ("cp", DENSE, {"cp": 3}),
        ("micro_batch", DENSE, {"dp": 8, "micro_batch": 5}),
        ("ep", DENSE, {"ep": 2, "dp": 2}),
        ("etp", DENSE, {"etp": 2, "tp": 2}),
        ("ep", MOE, {"ep": 8, "dp": 8}),
        ("etp", MOE, {"etp": 8, "tp": 8}),
        ("ep", MOE, {"ep": 4, "dp": 6}),
        ("ep", MOE, {"ep": 4, "etp": 2, "dp": 4}),
        ("tp", ModelShape("moe", 96, 64, 4, MOE.attention, experts=SHARED), {"tp": 8}),
    ],
)
def test_what_does_not_divide_is_named(setting, shape, layout):
    with pytest.raises(ConfigError) as error:
        Layout(**RUN, **layout).check(shape)
    assert error.value.setting == setting


def test_chips_that_are_not_there():
    with pytest.raises(ConfigError, match="not the 16 there are"):
        Layout(**RUN, dp=8).check(DENSE, 16)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tp", 0), ("dp", 2.0), ("ep", True), ("recompute", "some"), ("precision", "fp16"), ("shard", "half")],
)
def test_a_field_out_of_range_is_named(setting, value):
    with pytest.raises(ConfigError) as error:
        Layout(**RUN, **{setting: value})
    assert error.value.setting == setting
