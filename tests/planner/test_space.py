"""The space holds exactly the layouts within its bounds that `Layout.check` lets pass, each once."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.planner import space
from anabranch.planner.space import divisors, layouts
from anabranch.workload.blocks import Attention, DenseFeedForward, Experts
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape

DENSE = ModelShape("llama", 96, 64, 12, Attention(12, 4, 16), DenseFeedForward(96))
MOE = ModelShape("moe", 96, 64, 7, Attention(8, 2, 16), experts=Experts(12, 2, 36, tuple(range(7))), mtp=1)


def checked(shape: ModelShape, chips: int, seq_len: int, batch: int, domain: int) -> set[Layout]:
    """One by one, by the words of the space's bounds."""
    sizes = divisors(chips)
    most_cp = min(32, seq_len // 2048) if seq_len >= 8192 else 1
    found = set[Layout]()
    meshes = itertools.product(sizes, sizes, range(1, 9), sizes, sizes, sizes, sizes, (1, 2, 4, 8, 16))
    for tp, pp, vp, cp, dp, ep, etp, micro in meshes:
        if tp * pp * cp * dp != chips or tp > min(domain, 64) or etp > min(domain, 8) or cp > most_cp:
            continue
        if pp * vp > shape.layers + shape.mtp or (vp > 1 and batch // (dp * micro) % pp):
            continue
        layout = Layout(
            seq_len, batch, micro, tp=tp, pp=pp, vp=vp, ep=ep, etp=etp, cp=cp, dp=dp, precision="fp8"
        )
        try:
            layout.check(shape, chips)
        except ConfigError:
            continue
        for again, shard in itertools.product(space.RECOMPUTED, space.SHARDED):
            found.add(Layout(**{**vars(layout), "recompute": again, "shard": shard}))
    return found


@settings(deadline=None, max_examples=15)
@given(
    shape=st.sampled_from([DENSE, MOE]),
    chips=st.sampled_from([1, 2, 6, 8, 12]),
    seq_len=st.sampled_from([8, 6 * 2048, 16384]),
    batch=st.sampled_from([1, 6, 24, 32]),
    domain=st.sampled_from([1, 4, 16]),
)
def test_the_space_is_what_check_lets_pass(shape, chips, seq_len, batch, domain):
    made = layouts(shape, chips, seq_len=seq_len, global_batch=batch, precision="fp8", domain=domain)
    listed = [made.layout(row) for row in range(len(made))]
    assert len(listed) == len(set(listed))
    assert set(listed) == checked(shape, chips, seq_len, batch, domain)


def test_parts_are_the_space_in_order():
    made = layouts(MOE, 8, seq_len=8, global_batch=32, domain=8)
    parts = list(made.parts(100))
    assert max(map(len, parts)) == 100
    assert [part.layout(row) for part in parts for row in range(len(part))] == [
        made.layout(row) for row in range(len(made))
    ]


def test_a_row_that_is_not_there_is_none():
    with pytest.raises(IndexError):
        layouts(MOE, 1, seq_len=8, global_batch=1, domain=1).layout(1000)
