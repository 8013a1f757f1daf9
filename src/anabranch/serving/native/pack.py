"""Weights in the order in which the C++ step reads them: see matrix.h.

Shape suffixes: N outputs, K inputs, E experts, F width of an expert, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as nnf

BLOCK = 32
HALF = BLOCK // 2
# What int8 weights are kept above their value.
ZERO = 128


def pad(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


def pack(weight_NK: Tensor, kind: str) -> Tensor:
    """Blocks of 32 outputs, input by input (pairs of inputs in bf16, fours in int8); outputs are padded with zeros.

    Leading dimensions stay in front. kind: "float32", "bfloat16", or "int8", whose blocks of bytes begin with the
    scales of their outputs.
    """
    weight_NK = nnf.pad(weight_NK, (0, 0, 0, pad(weight_NK.shape[-2], BLOCK) - weight_NK.shape[-2]))
    if kind == "int8":
        scale_N = weight_NK.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127.0
        whole_NK = ((weight_NK.float() / scale_N).round() + ZERO).to(torch.uint8)
        scales = scale_N.unflatten(-2, (-1, BLOCK)).flatten(-2).contiguous()
        return torch.cat([scales.view(torch.uint8), _blocks(whole_NK, 4).flatten(-3)], dim=-1)
    dtype = getattr(torch, kind)
    return _blocks(weight_NK.to(dtype), 1 if dtype == torch.float32 else 2)


def pack_gate_up(gate_up_EXD: Tensor, kind: str) -> Tensor:
    """[gates; ups] of each expert as blocks of 16 gates and their 16 ups; the width is padded to 32."""
    gate_EFD, up_EFD = gate_up_EXD.chunk(2, dim=-2)
    parts = [_halves(part) for part in (gate_EFD, up_EFD)]
    return pack(torch.cat(parts, dim=-2).flatten(-3, -2), kind)


def pack_down(down_EDF: Tensor, kind: str) -> Tensor:
    """Outputs in blocks of 32; inputs padded as `pack_gate_up` pads the width."""
    width = down_EDF.shape[-1]
    return pack(nnf.pad(down_EDF, (0, pad(width, BLOCK) - width)), kind)


def in_runs(down_EN: Tensor) -> Tensor:
    """Packed experts by two blocks, by one where their number is odd: the first of every expert, then the next. A step
    adds them up in this order, and memory gives what lies together faster."""
    return down_EN.unflatten(1, (-1, 1 if down_EN.shape[1] % 2 else 2)).transpose(0, 1)


def _blocks(weight_NK: Tensor, step: int) -> Tensor:
    *lead, _, inputs = weight_NK.shape
    return weight_NK.reshape(*lead, -1, BLOCK, inputs // step, step).transpose(-3, -2).contiguous()


def _halves(part_EFD: Tensor) -> Tensor:
    *lead, width, hidden = part_EFD.shape
    return nnf.pad(part_EFD, (0, 0, 0, pad(width, BLOCK) - width)).reshape(*lead, -1, HALF, hidden)
