"""Differentiable row movement inside one rank.

`spread` and `permute` need no atomics in either pass. `fan_in` adds rows of one token by `index_add`, in row order on
CPU; on CUDA it is reproducible under `torch.use_deterministic_algorithms(True)` (not run on hardware).

Shape suffixes: S tokens, K experts a token, P = S * K rows, N rows, U arrived tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor


class _Spread(torch.autograd.Function):
    """x_SD -> x[order // K]: each token once per row. Backward gathers the K gradients of a token and adds them."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_P: Tensor, inverse_P: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_P)
        ctx.top_k = top_k
        return x_SD.index_select(0, order_P // top_k)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_P,) = ctx.saved_tensors
        grad_SKD = grad_PD.index_select(0, inverse_P).view(-1, ctx.top_k, grad_PD.shape[-1])
        return grad_SKD.sum(dim=1), None, None, None


class _Permute(torch.autograd.Function):
    """x_PD -> x[order]. Backward is the gather by the inverse order."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P, inverse_P)
        return x_PD.index_select(0, order_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        _, inverse_P = ctx.saved_tensors
        return grad_PD.index_select(0, inverse_P), None, None


def spread(x_SD: Tensor, order_P: Tensor, inverse_P: Tensor, top_k: int) -> Tensor:
    """(S, D) to (P, D): row p is token order_P[p] // K."""
    return _Spread.apply(x_SD, order_P, inverse_P, top_k)


def permute(x_PD: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
    """(P, D) to (P, D): row p is row order_P[p] of x."""
    return _Permute.apply(x_PD, order_P, inverse_P)


class _Weigh(torch.autograd.Function):
    """sum over k of weights_SK * y_SKD, into a tensor of its own: FSDP2 hooks what a layer returns, and an
    in-place add of the model onto a view (`bmm(...).squeeze(1)`) would drop the hook.

    Products and sums have the wider type of the two, as in the models' own experts; y is saved as it came.
    """

    @staticmethod
    def forward(ctx: Any, y_SKD: Tensor, weights_SK: Tensor) -> Tensor:
        ctx.save_for_backward(y_SKD, weights_SK)
        wide = torch.promote_types(y_SKD.dtype, weights_SK.dtype)
        out_SD = y_SKD.new_empty((y_SKD.shape[0], y_SKD.shape[2]), dtype=wide)
        torch.bmm(weights_SK.to(wide).unsqueeze(1), y_SKD.to(wide), out=out_SD.unsqueeze(1))
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor]:
        y_SKD, weights_SK = ctx.saved_tensors
        grad_y = grad_SD.unsqueeze(1) * weights_SK.to(grad_SD.dtype).unsqueeze(-1)
        grad_weights = torch.bmm(y_SKD.to(grad_SD.dtype), grad_SD.unsqueeze(-1)).squeeze(-1)
        return grad_y.to(y_SKD.dtype), grad_weights.to(weights_SK.dtype)


def weigh(y_SKD: Tensor, weights_SK: Tensor) -> Tensor:
    """(S, D), in the wider type of the two: sum over k of weights_SK * y_SKD."""
    return _Weigh.apply(y_SKD, weights_SK)


class _WeighRows(torch.autograd.Function):
    """y_ND * weight_N in fp32 at least; saves the rows in the precision they came in."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weight_N)
        wide = torch.promote_types(y_ND.dtype, torch.float32)
        return y_ND.to(wide) * weight_N.to(wide).unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
        y_ND, weight_N = ctx.saved_tensors
        grad_y = (grad_ND * weight_N.to(grad_ND.dtype).unsqueeze(-1)).to(y_ND.dtype)
        return grad_y, (grad_ND * y_ND).sum(dim=-1).to(weight_N.dtype)


class _SumRows(torch.autograd.Function):
    """(N, D) to (U, D): rows summed by token. `index_add` by itself would keep the rows until backward, which reads
    nothing of them but their number."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, token_N: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token_N)
        return rows_ND.new_zeros((tokens, rows_ND.shape[-1])).index_add_(0, token_N, rows_ND)

    @staticmethod
    def backward(ctx: Any, grad_UD: Tensor) -> tuple[Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return grad_UD.index_select(0, token_N), None, None


def fan_in(y_ND: Tensor, weight_N: Tensor | None, token_N: Tensor, tokens: int) -> Tensor:
    """(U, D): rows, weighted where weights are given, summed per token in fp32 at least, in the rows' precision."""
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    rows_ND = y_ND.to(wide) if weight_N is None else _WeighRows.apply(y_ND, weight_N)
    return _SumRows.apply(rows_ND, token_N, tokens).to(y_ND.dtype)
