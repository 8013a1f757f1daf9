"""Resident experts: slots of a fixed arena, which the step's readers fill from the file of records.

`placement.residency` says how much each expert is wanted; native/store.h reads the needed and the expected ones and
drops the least wanted.
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anabranch.errors import ConfigError
from anabranch.placement.residency import Popularity
from anabranch.serving import huge_pages
from anabranch.serving.decoder import Decoder
from anabranch.serving.native.library import Store as NativeStore
from anabranch.serving.store.checkpoint import Checkpoint
from anabranch.serving.store.records import ExpertShape, Records

# Steps after which a step counts half in the forecast; from 8 to 4096 alike for a trained `tiny` (docs/log.md).
HALF_LIFE_STEPS = 64
MIB = 1 << 20


class StoreFigures(NamedTuple):
    """Since the engine was made. Needs: one a step, layer and expert with at least one row.

    hits: resident when needed. late: still being read, having been expected. misses: neither. bytes_read: expected
    and needed ones. wait_ms: time in which some thread waited for an expert.
    """

    hits: int
    late: int
    misses: int
    bytes_read: int
    wait_ms: float
    slots: int
    experts: int
    record_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of needs whose expert was resident."""
        return self.hits / max(self.hits + self.late + self.misses, 1)


class ExpertStore:
    """The experts of one engine. Give it memory by `claim`, then hand `native` to the step."""

    def __init__(
        self, checkpoint: Checkpoint, decoder: Decoder, weights: str, limit_mib: int, folder: Path
    ) -> None:
        self.limit_bytes = limit_mib * MIB
        self.records = Records(checkpoint, _shape(decoder, weights), folder.expanduser())
        self._arena: mmap.mmap | None = None
        self._file: int | None = None
        self._slots = 0
        count = self.records.shape.count
        self.popularity = Popularity(count, HALF_LIFE_STEPS)
        self._needed_N = np.zeros(count, dtype=np.uint8)
        self._counted = np.zeros(5, dtype=np.int64)

    def claim(self, dense_bytes: int) -> NativeStore:
        """Take what the limit leaves beside `dense_bytes`. Raises ConfigError where that is not one expert."""
        records, size = self.records, self.records.shape.record_bytes
        self._slots = min((self.limit_bytes - dense_bytes) // size, records.shape.count)
        if self._slots < 1:
            raise ConfigError(
                f"{self.limit_bytes // MIB} MiB do not hold attention, norms, embeddings and head and one expert; "
                f"the least that works is {-(-(dense_bytes + size) // MIB)}",
                setting="memory_limit_mib",
            )
        self._arena = huge_pages.memory(self._slots * size)
        self._file = _open_direct(records.path)
        return NativeStore(
            self._file, self._slots, records.shape.count, records.first_byte, size,
            ctypes.addressof(ctypes.c_char.from_buffer(self._arena)), records.checksums_N.ctypes.data,
            self.popularity.wanted_N.ctypes.data, self._needed_N.ctypes.data, self._counted.ctypes.data,
        )  # fmt: skip

    def first_record(self, layer: int) -> int:
        """The number of a layer's first expert."""
        shape = self.records.shape
        return shape.layers.index(layer) * shape.experts

    def after_step(self) -> None:
        """Take the step's needs into the forecast."""
        self.popularity.observe(self._needed_N)
        self._needed_N[:] = 0

    def figures(self) -> StoreFigures:
        """What was needed and read so far."""
        shape = self.records.shape
        hits, late, misses, reads, wait_ns = self._counted.tolist()
        size = shape.record_bytes
        return StoreFigures(hits, late, misses, reads * size, wait_ns / 1e6, self._slots, shape.count, size)

    def close(self) -> None:
        """Give file and memory back, once no step can use them."""
        if self._file is not None:
            os.close(self._file)
        self._file = self._arena = None


def _shape(decoder: Decoder, weights: str) -> ExpertShape:
    stored = {
        i: layer.experts for i, layer in enumerate(decoder.layers) if layer.experts.router_ED is not None
    }
    sizes = {tuple(experts.down_EDF.shape) for experts in stored.values()}
    if len(sizes) != 1:
        raise ConfigError("wants a model with experts, of one size in all layers", setting="memory_limit_mib")
    experts, hidden, width = sizes.pop()
    return ExpertShape(tuple(stored), experts, hidden, width, weights)


def _open_direct(path: Path) -> int:
    """Past the system's cache, whose copies would cost time and memory, where the file system can do that."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, os.O_RDONLY)
