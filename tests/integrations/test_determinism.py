"""Two runs of the same training are bit-identical."""

import pytest
import torch
from tests.integrations.parity import STEPS, Judge, Layout, on_rank

from run_distributed import RankPool


@pytest.mark.parametrize(
    ("family", "planner", "transport"),
    [
        ("mixtral", "exact", "dedup"),
        ("gpt_oss", "bounded", "all_to_all"),
        ("qwen3_moe", "exact", "all_gather"),
    ],
)
def test_a_second_run_is_bit_identical(family, planner, transport, ranks2: RankPool, judge: Judge) -> None:
    layout = Layout(fsdp=2, ep=2, planner=planner, transport=transport)
    first, second = (ranks2.run(on_rank, judge.checkpoint(family), layout) for _ in range(2))
    for before, after in zip(first, second, strict=True):
        assert len(before.losses) == STEPS
        assert before.losses == after.losses
        assert before.parameters.keys() == after.parameters.keys()
        assert all(torch.equal(t, after.parameters[name]) for name, t in before.parameters.items())
    assert first[0].guests > 0
