"""Weights in the order in which the C++ step reads them: see matrix.h.

Shape suffixes: N outputs, K inputs, E experts, F width of an expert, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as nnf

BLOCK = 64
HALF = BLOCK // 2


def pad(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


def pack(weight_NK: Tensor) -> Tensor:
    """Blocks of 64 outputs, input by input (pairs of inputs in bf16); outputs are padded with zeros.

    Leading dimensions stay in front.
    """
    *lead, outputs, inputs = weight_NK.shape
    weight_NK = nnf.pad(weight_NK, (0, 0, 0, pad(outputs, BLOCK) - outputs))
    step = 2 if weight_NK.dtype == torch.bfloat16 else 1
    blocks = weight_NK.reshape(*lead, -1, BLOCK, inputs // step, step)
    return blocks.transpose(-3, -2).contiguous()


def pack_gate_up(gate_up_EXD: Tensor) -> Tensor:
    """[gates; ups] of each expert as blocks of 32 gates and their 32 ups; the width is padded to 32."""
    gate_EFD, up_EFD = gate_up_EXD.chunk(2, dim=-2)
    parts = [_halves(part) for part in (gate_EFD, up_EFD)]
    return pack(torch.cat(parts, dim=-2).flatten(-3, -2))


def pack_down(down_EDF: Tensor) -> Tensor:
    """Outputs in blocks of 64; inputs padded as `pack_gate_up` pads the width."""
    width = down_EDF.shape[-1]
    return pack(nnf.pad(down_EDF, (0, pad(width, HALF) - width)))


def _halves(part_EFD: Tensor) -> Tensor:
    *lead, width, hidden = part_EFD.shape
    return nnf.pad(part_EFD, (0, 0, 0, pad(width, HALF) - width)).reshape(*lead, -1, HALF, hidden)
