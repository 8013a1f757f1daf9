"""Which tensors of this process are alive, and how many bytes they hold: by their storages, not by the process."""

import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Residents(TorchDispatchMode):
    """While entered, counts every storage that an operation returns, until it is freed; several tensors share one.

    now, peak: bytes. at_peak: those of storages by the sizes of the tensor that each was made for. Tensors made before
    are given to `watch`; what a kernel allocates and frees inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: Counter[tuple[int, ...]] = Counter()
        self._live: dict[int, tuple[int, tuple[int, ...], Any]] = {}
        self._storage: Any = torch.UntypedStorage
        self._resize: Any = self._storage.resize_

    def __enter__(self) -> "Residents":
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP frees what it gathered, and takes it back, by a storage's size: no operation tells."""
            result = self._resize(storage, size)
            if storage._cdata in self._live:
                before, sizes, ref = self._live[storage._cdata]
                self._live[storage._cdata] = (storage.nbytes(), sizes, ref)
                self._changed(storage.nbytes() - before)
            return result

        self._storage.resize_ = resize_
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._storage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors, of sharded ones those here."""
        for part in (part for tensor in tensors for part in _parts(tensor)):
            storage, key = part.untyped_storage(), part.untyped_storage()._cdata
            if key not in self._live:
                ref = weakref.ref(storage, partial(self._gone, key))
                self._live[key] = (storage.nbytes(), tuple(part.shape), ref)
                self._changed(storage.nbytes())

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = 0
        self._changed(0)

    def _gone(self, key: int, _: Any) -> None:
        self._changed(-self._live.pop(key)[0])

    def _changed(self, by: int) -> None:
        self.now += by
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, Counter()
            for size, sizes, _ in self._live.values():
                self.at_peak[sizes] += size


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of these tensors here, each once."""
    storages = [part.untyped_storage() for tensor in tensors for part in _parts(tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's numbers here."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [part for inner in held if isinstance(inner, Tensor) for part in _parts(inner)]
