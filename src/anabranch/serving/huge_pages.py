"""Memory straight from the system, in huge pages where it grants them: what is streamed seldom misses the translation
cache then. An allocator hands out what was used before, whose small pages stay small."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 1 << 21


def memory(size: int) -> mmap.mmap:
    """So many bytes, all zero. Raises OSError where the system has not that much, OverflowError where none could."""
    fresh = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            fresh.madvise(mmap.MADV_HUGEPAGE)
    return fresh


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As torch's `empty`, on the CPU; what is smaller than a huge page comes from there."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory(size), dtype=dtype).view(shape)
