"""Index arithmetic shared by the transports: reading segments of a sorted list in another order.

Shape suffixes: P rows this rank sends (S tokens x K experts), G segments.
"""

import numpy as np
import torch
from torch import Tensor

from anabranch.placement.base import IntArray


def segment_index(start_G: IntArray, length_G: IntArray, device: torch.device) -> Tensor:
    """int64 (sum of lengths): the concatenation of arange(start, start + length) over the segments."""
    ends_G = np.cumsum(length_G)
    total = int(ends_G[-1]) if ends_G.size else 0
    # A row's place is its segment's start plus its place within the segment; the shift is constant per segment.
    shift_G = start_G - (ends_G - length_G)
    index = np.repeat(shift_G, length_G)
    index += np.arange(total)
    return torch.from_numpy(index).to(device, non_blocking=True)


def expert_order(ids_P: Tensor) -> Tensor:
    """int64 (P,): positions of the rows sorted by expert, ties in row order (stable, hence deterministic)."""
    return torch.argsort(ids_P, stable=True)


def inverse_order(order_P: Tensor) -> Tensor:
    """int64 (P,): where each row went under `order_P`."""
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(order_P.shape[0], device=order_P.device)
    return inverse_P


def starts(length_G: IntArray) -> IntArray:
    """Exclusive prefix sum."""
    return np.cumsum(length_G) - length_G
