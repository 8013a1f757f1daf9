"""Index arithmetic, by brute force."""

import numpy as np
import torch

from anabranch.transport.segments import expert_order, inverse_order, segment_index, starts

CPU = torch.device("cpu")


def test_segment_index_concatenates_ranges() -> None:
    start_G, length_G = np.array([7, 0, 3, 5]), np.array([2, 0, 3, 1])
    assert segment_index(start_G, length_G, CPU).tolist() == [7, 8, 3, 4, 5, 5]
    nothing = np.zeros(0, dtype=np.int64)
    assert segment_index(nothing, nothing, CPU).tolist() == []


def test_starts_is_an_exclusive_sum() -> None:
    assert starts(np.array([2, 0, 3])).tolist() == [0, 2, 2]


def test_orders_are_stable_and_invert() -> None:
    ids_P = torch.tensor([1, 0, 1, 2, 0, 1])
    order_P = expert_order(ids_P)
    assert order_P.tolist() == [1, 4, 0, 2, 5, 3]
    assert inverse_order(order_P)[order_P].tolist() == list(range(6))
    assert order_P[inverse_order(order_P)].tolist() == list(range(6))
