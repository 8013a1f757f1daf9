"""bfloat16 on the wire."""

from typing import ClassVar

import torch
from torch import Tensor

from anabranch.transport.codecs.base import Codec


class Bf16(Codec):
    """Two bytes a number, rounded to nearest: eight bits of mantissa, the range of fp32."""

    name: ClassVar[str] = "bf16"

    def row_bytes(self, hidden: int) -> int:
        return 2 * hidden

    def encode(self, x_ND: Tensor) -> Tensor:
        return x_ND.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, wire_NW: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        return wire_NW.view(torch.bfloat16).to(dtype)
