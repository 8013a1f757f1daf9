"""Batch-invariant fp32: a token's logits are the same bits in every batch, so a rollout's log-probabilities are the
trainer's.

Only a few of torch's functions on the CPU let a row's result depend on the rows beside it: products and attention
choose the order of their sums by the sizes they are given, and `silu` and `sigmoid` compute the end of a tensor by
other code than its middle. `BatchInvariant` replaces these, under the names by which models call them; what it leaves
alone is row by row in torch itself, which tests/serving/test_invariant.py checks. The idea is that of He et al.,
"Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab, 2025).

Shape suffixes: R rows, K inputs, N outputs, E groups, B sequences, H heads, G key-value heads, T rows of a sequence,
M its tokens, D head dimension.
"""

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from anabranch.errors import ConfigError
from anabranch.serving.native.library import Attention, Heads, library


class BatchInvariant(TorchFunctionMode):
    """Within this context, models of transformers compute each row alone, forward and with gradients.

    Wrap the trainer's forward and an engine with step="torch" (the C++ step has an order of its own). The model is in
    fp32 on the CPU, with sdpa attention and grouped_mm experts, transformers' defaults. Sequences may be padded on
    either side; with padding on the left, position ids count from the first token. It holds for the thread that
    enters it, and for `backward` where activations are computed again.

    Raises ConfigError, within, for a product or an attention that it cannot compute so, and BuildError without a
    C++ compiler.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in REFUSED:
            raise ConfigError(f"{func} is not batch-invariant and has no replacement here", setting="model")
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def batch_invariant() -> bool:
    """Whether this thread is within `BatchInvariant`."""
    return any(isinstance(mode, BatchInvariant) for mode in _get_current_function_mode_stack())


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """As torch's, each output summed over the inputs one by one."""
    ends_E = torch.tensor([x.numel() // x.shape[-1]], dtype=torch.int32)
    out = cast(Tensor, _Product.apply(x, weight_NK.unsqueeze(0), ends_E))
    return out if bias_N is None else out + bias_N


def grouped_mm(
    x_RK: Tensor, weight_EKN: Tensor, offs: Tensor, bias: None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """As torch's over sorted rows; rows after the last group become zeros."""
    assert bias is None and out_dtype in (None, torch.float32)
    return cast(Tensor, _Product.apply(x_RK, weight_EKN.transpose(1, 2), offs.int()))


def bmm(a_BNK: Tensor, b_BKM: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As torch's where N or M is 1: the weighted sums of experts' answers, and their gradients."""
    if 1 not in (a_BNK.shape[1], b_BKM.shape[2]):
        raise ConfigError("products of batches of matrices are not computed", setting="model")
    rows = a_BNK.shape[1] == 1
    a, b = (a_BNK.mT, b_BKM) if rows else (a_BNK, b_BKM.mT)
    sums = (a * b).sum(1 if rows else 2, keepdim=True)
    return sums if out is None else out.copy_(sums)


def sigmoid(x: Tensor) -> Tensor:
    """Of functions that torch computes alike everywhere. Below -80 it is e^-80, with no gradient."""
    return 1 / (1 + (-x.clamp(min=-80)).exp())


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x); never in place."""
    return x / (1 + (-x.clamp(min=-80)).exp())


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As torch's scaled_dot_product_attention, where each row attends to neighbouring keys. Returns (B, H, T, D)."""
    if dropout_p:
        raise ConfigError("dropout of attention is random: set it to 0", setting="model")
    first_BT, last_BT = _ranges(query, key, attn_mask, is_causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return cast(Tensor, _RowAttention.apply(query, key, value, first_BT, last_BT, scale))


class _Product(torch.autograd.Function):
    """Rows sorted into groups, the rows before ends_E of each with a matrix of their own. x: of any leading
    dimensions; FSDP wants no view of the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
        _check(x, weight_ENK)
        x, weight_ENK = x.contiguous(), weight_ENK.contiguous()
        groups, outputs, inputs = weight_ENK.shape
        out = x.new_zeros(*x.shape[:-1], outputs)
        library().anabranch_product(
            x.data_ptr(), weight_ENK.data_ptr(), ends_E.data_ptr(), out.data_ptr(), groups, inputs, outputs
        )
        ctx.save_for_backward(x, weight_ENK, ends_E)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ENK, ends_E = ctx.saved_tensors
        x_RK, grad_RN = (t.reshape(-1, t.shape[-1]) for t in (x, grads[0].contiguous()))
        ends = ends_E.tolist()
        of_x = torch.zeros_like(x_RK) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight_ENK) if ctx.needs_input_grad[1] else None
        with torch._C.DisableTorchFunction():
            for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
                grad = grad_RN[first:last]
                if of_x is not None:
                    torch.mm(grad, weight_ENK[e], out=of_x[first:last])
                if of_weight is not None:
                    torch.mm(grad.t(), x_RK[first:last], out=of_weight[e])
        return None if of_x is None else of_x.view_as(x), of_weight, None


class _RowAttention(torch.autograd.Function):
    """Row t of sequence b attends to keys first_BT[b, t] to last_BT[b, t], the last left out. Backward is torch's."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first_BT: Tensor, last_BT: Tensor, scale: float
    ) -> Tensor:
        _check(query, key, value)
        if value.shape[-1] != query.shape[-1]:
            raise ConfigError("values of another dimension than keys are not computed", setting="model")
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        sequences, heads, rows, dim = query.shape
        out_BTHD = query.new_empty(sequences, rows, heads, dim)
        call = Attention(
            sequences, heads, key.shape[1], rows, key.shape[2], dim, scale, _heads(query), _heads(key), _heads(value),
            first_BT.data_ptr(), last_BT.data_ptr(), out_BTHD.data_ptr(),
        )  # fmt: skip
        library().anabranch_attention(ctypes.byref(call))
        ctx.save_for_backward(query, key, value, first_BT, last_BT)
        ctx.scale = scale
        return out_BTHD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, first_BT, last_BT = ctx.saved_tensors
        at_M = torch.arange(saved[1].shape[2])
        seen = (at_M >= first_BT[:, None, :, None]) & (at_M < last_BT[:, None, :, None])
        # A row that sees nothing would make torch's softmax divide by zero: it sees all, and its gradient is zero.
        blind = ~seen.any(-1, keepdim=True)
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in saved]
            out = nnf.scaled_dot_product_attention(
                *inputs, attn_mask=seen | blind, scale=ctx.scale, enable_gqa=True
            )
            found = torch.autograd.grad(out, inputs, grads[0].masked_fill(blind, 0.0))
        return (*found, None, None, None)


def _ranges(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The keys each row sees, as int32 first_BT and last_BT (which is left out)."""
    sequences, _, rows, _ = query.shape
    tokens = key.shape[2]
    if mask is None:
        last_T = torch.arange(1, rows + 1).clamp(max=tokens) if is_causal else torch.full((rows,), tokens)
        last_BT = last_T.int().expand(sequences, rows).contiguous()
        return torch.zeros_like(last_BT), last_BT
    mask_BTM = mask.reshape(-1, *mask.shape[-2:]).expand(sequences, rows, tokens) if _one_head(mask) else None
    if mask_BTM is None or mask.dtype != torch.bool:
        raise ConfigError("only masks of bools, the same for all heads, are computed", setting="model")
    seen_BT = mask_BTM.sum(-1, dtype=torch.int32)
    first_BT = mask_BTM.byte().argmax(-1).int().contiguous()
    last_BT = first_BT + seen_BT
    reach_BT = torch.where(seen_BT > 0, tokens - mask_BTM.flip(-1).byte().argmax(-1), last_BT)
    if not torch.equal(reach_BT, last_BT.long()):
        raise ConfigError("a row attends to keys that are not neighbours", setting="model")
    return first_BT, last_BT


def _one_head(mask: Tensor) -> bool:
    return mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == 1)


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor.data_ptr(), *tensor.stride()[:3])


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ConfigError(
                f"batch-invariant mode computes float32 on the CPU, not {tensor.dtype} on {tensor.device}",
                setting="model",
            )


REPLACED: dict[Any, Callable[..., Tensor]] = {
    nnf.linear: linear,
    torch._grouped_mm: grouped_mm,
    torch.bmm: bmm,
    nnf.scaled_dot_product_attention: attention,
    nnf.silu: silu,
    torch.sigmoid: sigmoid,
    nnf.sigmoid: sigmoid,
    Tensor.sigmoid: sigmoid,
}
REFUSED = frozenset({
    torch.matmul, torch.mm, torch.addmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__,
})  # fmt: skip
