"""Ranks act alike or not at all."""

import os

import pytest
import torch.distributed as dist

from anabranch.errors import ConfigError, DataError, RankError
from anabranch.training.agreement import is_first, join, on_all_ranks, require_equal, wait_at_most, world_size


def fails_on(ranks):
    if dist.get_rank() in ranks:
        raise DataError(f"unreadable on rank {dist.get_rank()}; give another", setting="data")
    return dist.get_rank()


def caught(ranks):
    try:
        return on_all_ranks(lambda: fails_on(ranks))
    except DataError as error:
        return str(error), error.setting


@pytest.mark.parametrize(("failing", "told"), [([1], 1), ([0, 1], 0), ([0], 0)])
def test_an_error_of_one_rank_is_raised_on_all(ranks2, failing, told):
    assert ranks2.run(caught, failing) == [(f"data: unreadable on rank {told}; give another", "data")] * 2


def test_each_rank_keeps_its_own_result(ranks2):
    assert ranks2.run(caught, []) == [0, 1]


def disagree(settings):
    try:
        require_equal(settings | {"epsilon": 0.1 * dist.get_rank()})
    except RankError as error:
        return str(error)
    return None


def test_ranks_with_other_settings_are_told_apart(ranks2):
    told = "epsilon: epsilon is 0.0 on rank 0, 0.1 on rank 1; start every rank with the same settings"
    assert ranks2.run(disagree, {"planner": "exact"}) == [told] * 2


def agree(settings):
    require_equal(settings)
    return world_size(), is_first()


def test_ranks_with_equal_settings_go_on(ranks2):
    assert ranks2.run(agree, {"planner": "exact"}) == [(2, True), (2, False)]


def test_a_process_by_itself_agrees_with_itself():
    assert not dist.is_initialized()
    require_equal({"a": 1})
    assert on_all_ranks(lambda: 7) == 7
    assert (world_size(), is_first()) == (1, True)
    with pytest.raises(ConfigError, match="x: y"):
        on_all_ranks(lambda: (_ for _ in ()).throw(ConfigError("y", setting="x")))


def waits_for_nobody():
    """One rank of a new group waits for a collective that the other never joins."""
    group = dist.new_group()
    wait_at_most(1)
    told = None
    if dist.get_rank() == 0:
        try:
            dist.barrier(group)
        except RuntimeError as error:
            told = str(error)
    wait_at_most(1800)
    return told


def test_every_group_is_held_to_the_timeout(ranks2):
    told, _ = ranks2.run(waits_for_nobody)
    assert "imed out" in told
    ranks2.close()  # a group that timed out is of no more use


def test_a_single_rank_is_no_distributed_run(monkeypatch):
    """accelerate goes by LOCAL_RANK alone, and would wrap the model in DDP."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    join(timeout_s=10)
    assert "LOCAL_RANK" not in os.environ
    assert not dist.is_initialized()
