"""Memory straight from the system, in huge pages where it grants them: what is streamed seldom misses the translation
cache then. An allocator hands out what was used before, whose small pages stay small."""

import errno
import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 1 << 21
POPULATE_WRITE = 23  # of madvise(2), which Python 3.13 does not name yet


def memory(size: int) -> mmap.mmap:
    """So many bytes, all zero. Raises OSError where the system has not that much, OverflowError where none could."""
    fresh = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            fresh.madvise(mmap.MADV_HUGEPAGE)
    return fresh


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As torch's `empty`, on the CPU; what is smaller than a huge page comes from there. All of it is there at once:
    no step waits until the system has cleared a page, nor learns late that there is none. Raises as `memory`."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE:
        return torch.empty(shape, dtype=dtype)
    fresh = memory(size)
    try:
        fresh.madvise(POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel before 5.14 clears pages as they are written
            raise
    return torch.frombuffer(fresh, dtype=dtype).view(shape)
