"""New homes by past load: what is balanced stays, what is not is mended by few moves."""

import numpy as np

from anabranch.placement.base import Homes, max_over_mean
from anabranch.placement.rehome import WORTH, rehome


def skew(past_E: np.ndarray, homes: Homes) -> float:
    return max_over_mean(np.bincount(homes.rank_E, past_E, homes.ranks).astype(np.int64))


def test_even_load_moves_nothing() -> None:
    homes = Homes.contiguous(16, 4)
    assert rehome(np.full(16, 100), homes).moved == 0


def test_two_hot_experts_of_one_rank_are_parted_by_one_exchange() -> None:
    past_E = np.array([100, 100, 10, 10, 10, 10, 10, 10])
    found = rehome(past_E, Homes.contiguous(8, 4))
    assert found.moved == 2
    assert found.homes.rank_E[0] != found.homes.rank_E[1]
    assert skew(past_E, found.homes) == 110 * 4 / 260


def test_an_expert_may_move_into_an_empty_slot() -> None:
    # Five experts on two ranks of three slots: the second has a free one.
    found = rehome(np.array([50, 50, 50, 10, 10]), Homes.contiguous(5, 2))
    assert found.moved == 1
    assert skew(np.array([50, 50, 50, 10, 10]), found.homes) == 100 * 2 / 170


def test_a_gain_below_its_worth_moves_nothing() -> None:
    past_E = np.array([1000, 1000, 1000, 1000 - int(WORTH * 1000)])
    assert rehome(past_E, Homes.contiguous(4, 2)).moved == 0
