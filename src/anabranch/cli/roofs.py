"""What this machine can do at most, right now: reading memory, and products of a precision."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anabranch.costs.decode import Roof
from anabranch.errors import BuildError
from anabranch.serving import huge_pages
from anabranch.serving.invariant import linear
from anabranch.serving.native.library import library

ROOF_S = 0.2
READ_BYTES = 1 << 28
SIDE = 2048
PRECISIONS = ("float32", "bfloat16", "int8")  # from wide to narrow


def measure_roof(dtype: str) -> Roof:
    """With all cores: torch's sum of 256 MiB, and a product of 2,048 squared in `dtype`, the best of 0.2 s each.

    The product is torch's, and in fp32 ours too, for that of torch's library is half as fast on AMD's processors. A
    precision is never slower than those wider than it, which it could be widened to: without products of its own a
    processor multiplies bf16 as fp32.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        read_s, product_s = _least_s(_memory().sum), _least_s(_fastest(dtype)())
        return Roof(READ_BYTES / read_s / 1e9, 2 * SIDE**3 / product_s / 1e9)
    finally:
        torch.set_num_threads(threads)


def typical(roofs: Sequence[Roof]) -> Roof:
    """The median of each: neighbours on a shared host leave a half of the memory's speed, or all of it."""
    return Roof(median(roof.read_gbps for roof in roofs), median(roof.gflops for roof in roofs))


def _memory() -> Tensor:
    """In huge pages, as weights and pages of the engine are."""
    return huge_pages.empty(torch.Size((READ_BYTES // 4,)), torch.float32).fill_(1.0)


def _product(precision: str) -> Callable[[], Tensor]:
    square = torch.ones(SIDE, SIDE, dtype=getattr(torch, precision))
    return partial(torch._int_mm if precision == "int8" else torch.mm, square, square)


@cache
def _fastest(dtype: str) -> Callable[[], Callable[[], Any]]:
    """What makes the fastest product in this precision: a property of the machine, found once a process."""
    makers: list[Any] = [partial(_product, kind) for kind in PRECISIONS[: PRECISIONS.index(dtype) + 1]]
    with suppress(BuildError):  # no compiler: torch's alone
        library()
        makers.append(_our_product)
    return min(makers, key=lambda make: _least_s(make()))


def _our_product() -> Callable[[], Any]:
    """In fp32, its rows spread over threads."""
    square, pool = torch.ones(SIDE, SIDE), ThreadPoolExecutor()
    rows = square.chunk(os.cpu_count() or 1)
    return lambda: list(pool.map(linear, rows, [square] * len(rows)))


def _least_s(work: Callable[[], Any]) -> float:
    times: list[float] = []
    until_s = time.perf_counter() + ROOF_S
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times)
