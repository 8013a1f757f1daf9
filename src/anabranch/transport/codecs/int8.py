"""Signed bytes on the wire, with a scale per block."""

from typing import ClassVar

import torch
from torch import Tensor

from anabranch.transport.codecs.base import BlockScaled


class Int8(BlockScaled):
    """Rounds to the nearest of 255 steps: an error of at most 1/254 of the block's largest number."""

    name: ClassVar[str] = "int8"
    largest: ClassVar[float] = 127.0
    byte_type: ClassVar[torch.dtype] = torch.int8

    def to_bytes(self, scaled: Tensor) -> Tensor:
        return scaled.round_().to(torch.int8)


class Int8Stochastic(Int8):
    """Rounds up or down with the probability that leaves the mean unchanged.

    Draws from torch's global generator, whose state activation checkpointing restores for a recomputation.
    """

    name: ClassVar[str] = "int8_stochastic"

    def to_bytes(self, scaled: Tensor) -> Tensor:
        return (scaled + torch.rand_like(scaled)).floor_().clamp_(-127, 127).to(torch.int8)
