"""Eight-bit floats on the wire, with a scale per block."""

from typing import ClassVar

import torch
from torch import Tensor

from anabranch.transport.codecs.base import BlockScaled


class Fp8(BlockScaled):
    """float8 e4m3: three bits of mantissa, so a relative error of at most 1/16 for each number that is not
    tiny within its block. Outliers cost their neighbours less than with int8."""

    name: ClassVar[str] = "fp8"
    largest: ClassVar[float] = 448.0
    byte_type: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def to_bytes(self, scaled: Tensor) -> Tensor:
        return scaled.to(torch.float8_e4m3fn)
