"""Contiguous homes when experts do not divide by ranks, and the load on them."""

import numpy as np

from anabranch.workload.scene import Scene, contiguous_max_mean


def test_the_last_ranks_own_what_is_left():
    scene = Scene(ranks=4, experts=6, tokens=1, top_k=1, seed=0, step=0)
    assert scene.home_E.tolist() == [0, 0, 1, 1, 2, 2]
    assert [scene.homes_of(rank).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4, 5], []]
    assert scene.full_ranks == 3


def test_max_mean_counts_ranks_without_experts():
    assert contiguous_max_mean(np.array([1, 1, 1, 1, 1, 1]), 4) == 4 / 3
    assert contiguous_max_mean(np.array([6, 0, 0, 0, 0, 0]), 4) == 4.0


def test_no_load_is_even():
    assert contiguous_max_mean(np.zeros(6), 4) == 1.0
