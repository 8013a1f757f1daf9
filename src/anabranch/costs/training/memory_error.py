"""How far published peaks of memory are from predicted ones. Nothing of the prediction is fitted on them, so all count.

What is published differs: allocated or reserved by the allocator, with or without the framework's own buffers.
"""

from collections.abc import Sequence
from math import ceil, exp, floor
from typing import NamedTuple

import numpy as np

from anabranch.costs.training.columns import Column, columns_of
from anabranch.costs.training.memory import peak_memory
from anabranch.costs.training.published import Published


class Peaks(NamedTuple):
    """Bytes on the fullest chip."""

    low: float
    high: float


def memory_ratios(rows: Sequence[Published]) -> Column:
    """Published over predicted of each leak group that has a peak, the geometric mean of its rows; rising."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        if row.memory_gb:
            layout, setup = columns_of([row.setup]).layout, row.setup
            predicted = peak_memory(setup.shape, layout, setup.layout.precision, setup.skew).total[0]
            logs.setdefault(row.leak_group, []).append(float(np.log(row.memory_gb * 1e9 / predicted)))
    return np.sort([exp(float(np.mean(group))) for group in logs.values()])


def peaks_within(ratios: Column, predicted_bytes: float, share: float) -> Peaks | None:
    """That hold `share` of new peaks, as many below as above: split-conformal, each tail by itself. With few ratios no
    more than the least and the largest; None without any."""
    size, tail = len(ratios), (1.0 - share) / 2.0
    if not size:
        return None
    low, high = max(1, floor((size + 1) * tail)), min(size, ceil((size + 1) * (1.0 - tail)))
    return Peaks(predicted_bytes * float(ratios[low - 1]), predicted_bytes * float(ratios[high - 1]))
