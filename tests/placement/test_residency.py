"""The forecast that decides which experts stay in memory."""

import numpy as np
import pytest

from anabranch.placement.residency import Popularity


def needed(*experts: int) -> np.ndarray:
    made = np.zeros(4, dtype=np.uint8)
    made[list(experts)] = 1
    return made


def test_it_is_the_share_of_steps_in_the_long_run() -> None:
    popularity = Popularity(4, half_life=200)
    for step in range(4000):
        popularity.observe(needed(0, *([1] if step % 2 else []), *([2] if step % 10 == 0 else [])))
    assert popularity.wanted_N == pytest.approx([1.0, 0.5, 0.1, 0.0], abs=0.02)


def test_a_step_counts_half_after_the_half_life() -> None:
    popularity = Popularity(4, half_life=8)
    popularity.observe(needed(3))
    first = float(popularity.wanted_N[3])
    for _ in range(8):
        popularity.observe(needed())
    assert popularity.wanted_N[3] == pytest.approx(first / 2)


def test_a_new_favourite_overtakes_an_old_one_within_the_half_life() -> None:
    popularity = Popularity(4, half_life=16)
    for _ in range(200):
        popularity.observe(needed(0))
    for _ in range(17):
        popularity.observe(needed(1))
    assert popularity.wanted_N[1] > popularity.wanted_N[0]


def test_the_forecast_stays_where_the_native_store_reads_it() -> None:
    popularity = Popularity(4, half_life=16)
    before = popularity.wanted_N.ctypes.data
    popularity.observe(needed(2))
    assert popularity.wanted_N.ctypes.data == before
