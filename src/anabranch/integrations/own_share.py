"""A rank's shares of a sharded model, in memory of their own.

transformers (5.24) reads a whole tensor and keeps a rank's slice of it: the slice is a view, so every rank holds the
whole model, but for what it stacks from several tensors. FSDP2 takes the shares as they are at the first forward.
"""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def own_shares(model: nn.Module) -> None:
    """Copy each share that is a part of a larger tensor, so that the rest is freed. Call before the first forward."""
    sharded: list[Any] = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    for parameter in sharded:
        share = parameter._local_tensor
        if share.untyped_storage().nbytes() > share.nbytes:
            parameter._local_tensor = share.clone()
