"""Ranks act alike or not at all.

Before a run begins every rank checks its own settings, model and data. A mistake may show on one rank only,
while the others would wait for it in a collective; so each check ends with all ranks hearing of it.
"""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from anabranch.errors import AnabranchError, RankError

T = TypeVar("T")


def join(timeout_s: int) -> None:
    """Join the group of ranks that the environment describes; a process by itself needs none."""
    if dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Where torchrun named a rank, accelerate would wrap even a single one's model in DDP: all gradients twice.
        os.environ.pop("LOCAL_RANK", None)
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:  # else all ranks of a machine would meet on its first device
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    backend = dist.get_default_backend_for_device(accelerator or torch.device("cpu"))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def leave() -> None:
    """Leave the group, once no rank waits for this one any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_at_most(timeout_s: int) -> None:
    """Hold all groups to the timeout. A group made by a device mesh starts with torch's own, half an hour."""
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=timeout_s), group)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that writes and shows."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_all_ranks(action: Callable[[], T]) -> T:
    """This rank's result of `action`. Collective: where any rank raises an AnabranchError, all raise it."""
    try:
        result, failure = action(), None
    except AnabranchError as error:
        result, failure = None, error
    first = next((error for error in gathered(failure) if error is not None), None)
    if first is not None:
        raise first
    return result  # pyright: ignore[reportReturnType]


def require_equal(settings: Mapping[str, Any]) -> None:
    """Raise RankError on all ranks where they were started with different settings."""
    known = gathered(dict(settings))
    for rank, theirs in enumerate(known):
        changed = [name for name in known[0] if theirs[name] != known[0][name]]
        if changed:
            told = ", ".join(
                f"{n} is {known[0][n]!r} on rank 0, {theirs[n]!r} on rank {rank}" for n in changed
            )
            raise RankError(f"{told}; start every rank with the same settings", setting=changed[0])


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
