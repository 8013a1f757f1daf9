"""Pages of preempted chains in host memory or on disk, so that they are not computed once more.

On disk a chain is one safetensors file in the run's own folder, which this process holds locked: a folder that
nobody holds is of a dead run, and is removed at the start of the next.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain
from anabranch.scheduling.pages import pages_of
from anabranch.serving.pools import FORMAT_SHIFT, FORMATS
from anabranch.serving.table import PageTable

# By format: a chain's pages, in their order.
Block = dict[str, Tensor]
RUN = "anabranch-kv-"


class _Kept(NamedTuple):
    """One chain's copies: their size, and where they are. path: None in host memory."""

    size: int
    path: Path | None
    block: Future[Block]


class PageTier:
    """Keeps up to `limit_bytes` of pages, in files of a folder of its own in `folder`, or in host memory for None.

    Files are written and read on a thread of its own. A file that cannot be written or read back is lost: its chain
    is computed once more. Raises ConfigError for a folder that cannot be used.
    """

    def __init__(
        self, table: PageTable, pools: dict[str, Tensor], limit_bytes: int, folder: Path | None
    ) -> None:
        self._table, self._pools, self._limit = table, pools, limit_bytes
        self._kept: dict[Chain, _Kept] = {}
        self._files = ThreadPoolExecutor(1, "anabranch-kv")
        self._folder: _RunFolder | None = None if folder is None else _RunFolder(folder)
        self._count = 0

    @property
    def held_bytes(self) -> int:
        """Of all copies."""
        return sum(kept.size for kept in self._kept.values())

    def keep(self, chain: Chain) -> bool:
        """Copy the pages of a running chain; False where they do not fit."""
        pages = self._table.pages(chain)[: pages_of(chain.held)]
        by_format = {k: [i for i in pages if FORMATS[i >> FORMAT_SHIFT] == k] for k in self._pools}
        size = sum(len(of) * self._pools[kind][0].numel() for kind, of in by_format.items())
        if self.held_bytes + size > self._limit:
            return False
        block = {kind: self._pools[kind][_indices(of)].contiguous() for kind, of in by_format.items() if of}
        path, done = None, Future[Block]()
        if self._folder is None:
            done.set_result(block)
        else:
            self._count += 1
            path = self._folder.path / f"{self._count}.safetensors"
            done = self._files.submit(_written, block, path)
        self._kept[chain] = _Kept(size, path, done)
        return True

    def prefetch(self, chains: Iterable[Chain]) -> None:
        """Begin to read the copies of chains that will soon get a slot."""
        for chain in chains:
            kept = self._kept.get(chain)
            if (
                kept is not None
                and kept.path is not None
                and kept.block.done()
                and not _in_memory(kept.block)
            ):
                self._kept[chain] = kept._replace(block=self._files.submit(load_file, kept.path))

    def fetch(self, chain: Chain, first: int) -> bool:
        """Write the copies into the chain's pages from number `first` on; False where they are lost."""
        kept = self._kept.pop(chain)
        try:
            block = kept.block.result()
            if not block:
                assert kept.path is not None
                block = load_file(kept.path)
        except (OSError, SafetensorError):
            return False
        finally:
            self._remove(kept)
        self._table.enter(chain, 0)
        pages = self._table.pages(chain)[: pages_of(chain.held)]
        for kind, copies in block.items():
            into = [(i, page) for i, page in enumerate(pages) if FORMATS[page >> FORMAT_SHIFT] == kind]
            wanted = [(at, page) for at, (i, page) in enumerate(into) if i >= first]
            self._pools[kind][_indices([page for _, page in wanted])] = copies[[at for at, _ in wanted]]
        return True

    def drop(self, chain: Chain) -> None:
        """Forget a chain's copies."""
        self._remove(self._kept.pop(chain))

    def close(self) -> None:
        """Remove all files."""
        self._files.shutdown(cancel_futures=True)
        self._kept.clear()
        if self._folder is not None:
            self._folder.close()

    def _remove(self, kept: _Kept) -> None:
        if kept.path is not None:
            self._files.submit(kept.path.unlink, missing_ok=True)


def _written(block: Block, path: Path) -> Block:
    """Writes the block and returns an empty one: its memory is given back."""
    save_file(block, path)
    return {}


def _in_memory(block: Future[Block]) -> bool:
    return block.exception() is not None or bool(block.result())


def _indices(pages: list[int]) -> Tensor:
    return torch.tensor(pages, dtype=torch.int64) & ((1 << FORMAT_SHIFT) - 1)


class _RunFolder:
    """A new folder in `parent`, locked while this process lives; those of dead processes are removed."""

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=RUN, dir=parent))
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"{parent} cannot be written: {error}", setting="spill_folder") from error
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        for other in parent.glob(f"{RUN}*"):
            if other != self.path:
                _remove_dead(other)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_dead(folder: Path) -> None:
    lock = folder / "lock"
    if not lock.exists():
        return  # just being made
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # its run lives
        shutil.rmtree(folder, ignore_errors=True)
