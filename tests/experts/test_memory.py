"""What a recomputation finds again."""

import numpy as np
import pytest
import torch

from anabranch.errors import PlanError
from anabranch.experts.memory import PlanMemory, recomputing
from anabranch.placement.base import Homes, Plan
from anabranch.placement.choice import Choice, Exchange


def choice(rows: int) -> Choice:
    counts_RE = np.array([[rows, 0], [0, rows]])
    plan = Plan(counts_RE, counts_RE, Homes.contiguous(2, 2), cap=rows)
    return Choice(plan, Exchange("dedup"), "static")


def ids(first: int, tokens: int = 12) -> torch.Tensor:
    return torch.arange(first, first + 2 * tokens).view(tokens, 2)


def test_the_latest_comes_first_and_only_once() -> None:
    memory = PlanMemory()
    for i in range(3):
        memory.remember(choice(i), ids(100 * i))
    recalled = [memory.recall(ids(100 * i)) for i in (2, 1, 0)]
    assert [int(r.choice.plan.counts_RE[0, 0]) for r in recalled if r] == [2, 1, 0]
    assert memory.recall(ids(0)) is None


def test_old_entries_fall_off() -> None:
    memory = PlanMemory(depth=2)
    for i in range(4):
        memory.remember(choice(i), ids(100 * i))
    assert memory.recall(ids(300)) is not None
    assert memory.recall(ids(200)) is not None
    assert memory.recall(ids(100)) is None


def test_the_first_choice_is_kept_where_near_ties_fall_otherwise() -> None:
    memory = PlanMemory()
    memory.remember(choice(1), ids(0))
    flipped = ids(0).clone()
    flipped[0] = flipped[0].flip(0)
    recalled = memory.recall(flipped)
    assert recalled is not None
    assert torch.equal(recalled.ids_SK, ids(0))


def test_no_tokens_are_remembered_too() -> None:
    memory = PlanMemory()
    memory.remember(choice(0), ids(0, tokens=0))
    assert memory.recall(ids(0, tokens=0)) is not None


def test_another_micro_batch_is_refused() -> None:
    memory = PlanMemory()
    memory.remember(choice(1), ids(0))
    with pytest.raises(RuntimeError, match="call backward on the latest micro-batch first"):
        memory.recall(ids(100))
    memory.remember(choice(1), ids(0))
    with pytest.raises(PlanError, match="call backward on the latest micro-batch first"):
        memory.recall(ids(0, tokens=5))


def test_recomputing_is_told_from_a_forward_pass() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda t: seen.append(recomputing()) or t * t, x, use_reentrant=False
    )
    y.sum().backward()
    assert seen == [False, True]
