"""The contract of a wire codec: rows to bytes and back.

Shape suffixes: N rows, D hidden size, W bytes of a row on the wire, G blocks of a row, B numbers of a block.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128


class Codec(ABC):
    """Encodes each row by itself, so that a row's bytes do not depend on what travels beside it.

    Lossy: what returns is near, not equal. Backward treats it as the identity, and the gradients, which take
    the same way back, are encoded likewise.
    """

    name: ClassVar[str]

    @abstractmethod
    def row_bytes(self, hidden: int) -> int:
        """W: bytes of an encoded row of `hidden` numbers."""

    @abstractmethod
    def encode(self, x_ND: Tensor) -> Tensor:
        """uint8 (N, W)."""

    @abstractmethod
    def decode(self, wire_NW: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        """(N, D) in `dtype`, a tensor of its own."""


class BlockScaled(Codec):
    """One byte a number, and one fp32 scale for every BLOCK numbers of a row: the largest of them over the
    largest value of the byte's type. A block of zeros has scale 0."""

    largest: ClassVar[float]

    @abstractmethod
    def to_bytes(self, scaled: Tensor) -> Tensor:
        """Numbers of at most `largest` in magnitude, rounded into a type of one byte."""

    byte_type: ClassVar[torch.dtype]

    def row_bytes(self, hidden: int) -> int:
        return hidden + 4 * _blocks(hidden)

    def encode(self, x_ND: Tensor) -> Tensor:
        hidden, blocks = x_ND.shape[1], _blocks(x_ND.shape[1])
        if not len(x_ND):  # torch sees strides and offsets in empty tensors, which cannot be viewed as bytes
            return x_ND.new_empty((0, self.row_bytes(hidden)), dtype=torch.uint8)
        x_NGB = pad(x_ND.float(), (0, blocks * BLOCK - hidden)).view(-1, blocks, BLOCK)
        scale_NG = x_NGB.abs().amax(dim=2) / self.largest
        inverse_NG = torch.where(scale_NG > 0, 1.0 / scale_NG, 0.0)
        # The reciprocal of a subnormal scale overflows: such a block is sent as zeros.
        inverse_NG = torch.where(inverse_NG.isinf(), 0.0, inverse_NG)
        bytes_NGB = self.to_bytes((x_NGB * inverse_NG.unsqueeze(-1)).clamp_(-self.largest, self.largest))
        bytes_ND = bytes_NGB.view(torch.uint8).view(-1, blocks * BLOCK)[:, :hidden]
        return torch.cat([bytes_ND, scale_NG.view(torch.uint8)], dim=1)

    def decode(self, wire_NW: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        blocks = _blocks(hidden)
        if not len(wire_NW):
            return wire_NW.new_empty((0, hidden), dtype=dtype)
        bytes_ND, scale = wire_NW.split([hidden, 4 * blocks], dim=1)
        scale_NG = scale.contiguous().view(torch.float32)
        x_ND = bytes_ND.contiguous().view(self.byte_type).float()
        x_NGB = pad(x_ND, (0, blocks * BLOCK - hidden)).view(-1, blocks, BLOCK)
        return x_NGB.mul_(scale_NG.unsqueeze(-1)).view(-1, blocks * BLOCK)[:, :hidden].to(dtype).contiguous()


def _blocks(hidden: int) -> int:
    return -(-hidden // BLOCK)
