"""Memory for pages of keys and values, one pool a format."""

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.errors import ConfigError

# As in pages.h: a page's number carries its format above this bit.
FORMAT_SHIFT = 28
FORMATS = ("float32", "bfloat16", "int8")
MADV_HUGEPAGE = 14


@dataclass(frozen=True)
class KvShape:
    """Sizes of one token's keys and values: layers, key-value heads and their dimension."""

    layers: int
    heads: int
    dim: int

    def page_bytes(self, kind: str) -> int:
        """Of one page of 16 tokens, scales included; as `PageShape` of pages.h counts."""
        numbers = 2 * 16 * self.dim
        one = {"float32": 4 * numbers, "bfloat16": 2 * numbers, "int8": numbers + 4 * (self.dim + 16)}
        return self.layers * self.heads * one[kind]


def first_page(kind: str) -> int:
    """Number of a format's first page. Raises ConfigError for an unknown format."""
    if kind not in FORMATS:
        raise ConfigError(f"{kind!r} is not known; choose of {', '.join(FORMATS)}", setting="kv_dtype")
    return FORMATS.index(kind) << FORMAT_SHIFT


def allocate(shape: KvShape, kind: str, pages: int) -> Tensor:
    """uint8 (pages, bytes of a page), of huge memory pages where the system grants them. Zeroed when touched."""
    pool = torch.empty(pages, shape.page_bytes(kind), dtype=torch.uint8)
    prefer_huge_pages(pool)
    return pool


def prefer_huge_pages(tensor: Tensor) -> None:
    """Advise the kernel to back the tensor by huge pages; without such a kernel nothing changes."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
