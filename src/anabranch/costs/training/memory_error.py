"""How far published peaks of memory are from predicted ones. Nothing of the prediction is fitted on them, so all count.

What is published differs: allocated or reserved by the allocator, with or without the framework's own buffers.
"""

from collections.abc import Sequence
from math import ceil, exp, floor
from typing import NamedTuple

import numpy as np

from anabranch.costs.training.columns import Column, layout_columns
from anabranch.costs.training.memory import peak_memory
from anabranch.costs.training.published import Published
from anabranch.costs.training.stacks import State, megatron, torchtitan

# What Megatron-Bridge's performance recipes say of a parameter: gradients in bf16, and with fp8 weights in fp8 without
# a transposed copy (scripts/performance/configs); Moonlight's keeps both moments in bf16 too (recipes/moonlight).
RECIPES = {"bf16": State(2, 2, 12, 2), "fp8": State(1, 2, 12, 1), "Moonlight-16B-A3B": State(2, 2, 8, 2)}
RECIPES["fp4"] = RECIPES["fp8"]


class Peaks(NamedTuple):
    """Bytes on the fullest chip."""

    low: float
    high: float


def published_peak(row: Published) -> float:
    """Bytes on the fullest chip as predicted of a published run, by the stack and the state that its software has."""
    shape, layout, family = row.setup.shape, row.setup.layout, row.setup.software.family
    stack = (torchtitan if "torchtitan" in family else megatron)(shape, layout.precision)
    if "megatron" in family:
        stack = stack._replace(plain=RECIPES.get(shape.family, RECIPES[layout.precision]))
    parts = peak_memory(shape, layout_columns([layout]), layout.precision, row.setup.skew, stack=stack)
    return float(parts.total[0])


def memory_ratios(rows: Sequence[Published]) -> Column:
    """Published over predicted of each leak group that has a peak, the geometric mean of its rows; rising."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        if row.memory_gb:
            logs.setdefault(row.leak_group, []).append(
                float(np.log(row.memory_gb * 1e9 / published_peak(row)))
            )
    return np.sort([exp(float(np.mean(group))) for group in logs.values()])


def peaks_within(ratios: Column, predicted_bytes: float, share: float) -> Peaks | None:
    """That hold `share` of new peaks, as many below as above: split-conformal, each tail by itself. With few ratios no
    more than the least and the largest; None without any."""
    size, tail = len(ratios), (1.0 - share) / 2.0
    if not size:
        return None
    low, high = max(1, floor((size + 1) * tail)), min(size, ceil((size + 1) * (1.0 - tail)))
    return Peaks(predicted_bytes * float(ratios[low - 1]), predicted_bytes * float(ratios[high - 1]))
