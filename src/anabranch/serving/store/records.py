"""The file of packed experts: made once for a checkpoint and a precision, kept, checked, repaired.

    digest of what it is made from (32 bytes) | digest of the checksums (32) | checksums (8 each) | 0 to 4096 bytes
    a record an expert, layer by layer: gate_up, down, 0 to a multiple of 4096 bytes

Records begin on multiples of 4096, so that they can be read without passing through the system's cache.
"""

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.errors import CheckpointError, ConfigError
from anabranch.serving.native import pack as packing
from anabranch.serving.native.library import library
from anabranch.serving.native.pack import pack_down, pack_gate_up, pad
from anabranch.serving.store.checkpoint import Checkpoint

ALIGN = 4096
DIGEST = 32


class ExpertShape(NamedTuple):
    """Which layers have how many experts, and their sizes. weights: "float32", "bfloat16" or "int8"."""

    layers: tuple[int, ...]
    experts: int
    hidden: int
    width: int
    weights: str

    @property
    def count(self) -> int:
        return len(self.layers) * self.experts

    @property
    def record_bytes(self) -> int:
        gate_up_XD = torch.empty(2 * self.width, self.hidden, device="meta")
        down_DF = torch.empty(self.hidden, self.width, device="meta")
        packed = pack_gate_up(gate_up_XD, self.weights), pack_down(down_DF, self.weights)
        return pad(sum(part.nbytes for part in packed), ALIGN)


class Records:
    """Packed experts of a checkpoint in a file of `folder`, which is made where it is not there or is not whole.

    Raises ConfigError where the disk has no room for it, and CheckpointError for a checkpoint that lacks an expert.
    """

    def __init__(self, checkpoint: Checkpoint, shape: ExpertShape, folder: Path) -> None:
        self.checkpoint, self.shape = checkpoint, shape
        self._digest = _identity(checkpoint, shape)
        self.path = folder / f"{checkpoint.folder.name}-{self._digest.hex()[:20]}.experts"
        self.first_byte = pad(2 * DIGEST + 8 * shape.count, ALIGN)
        self.bytes = self.first_byte + shape.count * shape.record_bytes
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be making it: who comes second waits and finds it made.
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists() and not self._whole():
                warnings.warn(f"{self.path} is damaged and made anew", stacklevel=2)
                self.path.unlink()
            if not self.path.exists():
                self._make()
        self.checksums_N = self._checksums()

    def repair(self, number: int) -> None:
        """Write a damaged record anew, with a warning. Raises CheckpointError where it is not what it was."""
        warnings.warn(f"record {number} of {self.path} is damaged and made anew", stacklevel=2)
        record = self._record(number)
        if _checksum(record) != self.checksums_N[number]:
            raise CheckpointError(
                f"{self.checkpoint.folder} has changed since {self.path} was made; load it again",
                setting="model",
            )
        with self.path.open("r+b") as file:
            file.seek(self.first_byte + number * self.shape.record_bytes)
            file.write(record.data)
            file.flush()
            os.fsync(file.fileno())

    def _whole(self) -> bool:
        if self.path.stat().st_size != self.bytes:
            return False
        with self.path.open("rb") as file:
            digest, kept = file.read(DIGEST), file.read(DIGEST)
        return digest == self._digest and kept == hashlib.sha256(self._checksums().tobytes()).digest()

    def _checksums(self) -> NDArray[np.uint64]:
        return np.fromfile(self.path, dtype=np.uint64, count=self.shape.count, offset=2 * DIGEST)

    def _make(self) -> None:
        """Written beside and moved: a file that is there is whole."""
        free = shutil.disk_usage(self.path.parent).free
        if free < self.bytes:
            raise ConfigError(
                f"{self.path.parent} has {free >> 20} MiB free, the experts need {self.bytes >> 20}",
                setting="store_folder",
            )
        part = self.path.with_suffix(".part")
        checksums_N = np.zeros(self.shape.count, dtype=np.uint64)
        with part.open("wb") as file:
            file.seek(self.first_byte)
            for number in range(self.shape.count):
                record = self._record(number)
                checksums_N[number] = _checksum(record)
                file.write(record.data)
                if (number + 1) % self.shape.experts == 0:
                    # A layer at a time leaves the system's cache.
                    file.flush()
                    os.fdatasync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            kept = hashlib.sha256(checksums_N.tobytes()).digest()
            file.seek(0)
            file.write(self._digest + kept + checksums_N.tobytes())
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def _record(self, number: int) -> NDArray[np.uint8]:
        shape = self.shape
        layer, expert = divmod(number, shape.experts)
        gate_up_XD, down_DF = self.checkpoint.expert(shape.layers[layer], expert)
        packed = (pack_gate_up(gate_up_XD, shape.weights), pack_down(down_DF, shape.weights))
        record = np.zeros(shape.record_bytes, dtype=np.uint8)
        joined = torch.cat([part.flatten().view(torch.uint8) for part in packed]).numpy()
        record[: len(joined)] = joined
        return record


def _identity(checkpoint: Checkpoint, shape: ExpertShape) -> bytes:
    """Of the checkpoint's files, the sizes, and the code that packs."""
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in checkpoint.paths]
    layout = Path(packing.__file__).read_text(encoding="utf-8")
    told = json.dumps([files, *map(str, shape), ALIGN, layout])
    return hashlib.sha256(told.encode()).digest()


def _checksum(record: NDArray[np.uint8]) -> int:
    return library().anabranch_checksum(record.ctypes.data, record.nbytes)
