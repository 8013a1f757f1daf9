"""Guest weights: copies of hot experts, lent for one micro-batch, whose gradients return home.

Shape suffixes: L home slots, B guest slots, G experts in an exchange buffer (one per copy), U distinct home
experts that are lent.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.experts.seating import GuestTable
from anabranch.transport.collectives import exchange_plain


class _Lend(torch.autograd.Function):
    """Home parameters in; the same home parameters and this rank's guests out.

    The home parameters pass through so that one backward sees both gradients of an expert: its own rank's,
    and those of its copies. They are added in fp32 in (rank, slot) order, then rounded once.
    """

    @staticmethod
    def forward(ctx: Any, table: GuestTable, group: dist.ProcessGroup, *home_L: Tensor) -> tuple[Tensor, ...]:
        ctx.table, ctx.group = table, group
        guests = []
        for p_L in home_L:
            lent_G = _lent(p_L, table.send_index)
            arrived_G = exchange_plain(lent_G, list(table.send_R), list(table.recv_R), group)
            guests.append(arrived_G if table.in_order else arrived_G.index_select(0, table.take_B))
        return (*(p.view_as(p) for p in home_L), *guests)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, count = ctx.table, len(grads) // 2
        summed = []
        for home_L, guest_B in zip(grads[:count], grads[count:], strict=True):
            returned_G = guest_B
            if not table.in_order:
                # Empty guest slots share a place with a real one; their gradient is zero, so adding is exact.
                empty_G = guest_B.new_zeros((sum(table.recv_R), *guest_B.shape[1:]))
                returned_G = empty_G.index_add(0, table.take_B, guest_B)
            returned_G = exchange_plain(returned_G, list(table.recv_R), list(table.send_R), ctx.group)
            summed.append(_sum_at_home(home_L, returned_G, table))
        return (None, None, *summed)


def _lent(home_L: Tensor, send_index: Tensor) -> Tensor:
    """The experts sent. Buffers of fixed size also leave a rank that owns none: nobody reads its zeros."""
    if home_L.shape[0] == 0:
        return home_L.new_zeros((send_index.shape[0], *home_L.shape[1:]))
    return home_L.index_select(0, send_index)


def _sum_at_home(grad_L: Tensor, returned_G: Tensor, table: GuestTable) -> Tensor:
    """Add the returned gradients, one rank after the other: within a rank no expert repeats, so no add races."""
    if returned_G.shape[0] == 0 or grad_L.shape[0] == 0:
        return grad_L
    wide = torch.promote_types(grad_L.dtype, torch.float32)
    total_U = grad_L.index_select(0, table.lent_U).to(wide)
    sizes = list(table.send_R)
    for place, rows in zip(table.place_G.split(sizes), returned_G.split(sizes), strict=True):
        if place.shape[0]:
            total_U = total_U.index_add_(0, place, rows.to(wide))
    return _replace_rows(grad_L, table.lent_U, total_U.to(grad_L.dtype))


def _replace_rows(grad_L: Tensor, lent_U: Tensor, total_U: Tensor) -> Tensor:
    """The gradient with its lent experts' rows replaced.

    In place where that is safe: the gradient of a view made in `_Lend.forward` reaches nobody else, so a dense
    one is a buffer of its own; an expanded one (a broadcast gradient) shares memory with itself.
    """
    dense = grad_L.is_contiguous() or grad_L.transpose(-2, -1).is_contiguous()
    if dense and not torch.compiler.is_compiling():
        return grad_L.index_copy_(0, lent_U, total_U)
    return grad_L.index_copy(0, lent_U, total_U)


def lend(
    home: Sequence[Tensor], table: GuestTable, group: dist.ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """(home parameters, guest parameters), each (L or B, ...), in the order given.

    Allocates a copy of the experts sent and the guests received; home parameters pass through as views. In
    backward: the guests' gradients, and an fp32 copy of the home gradients of lent experts only. Collective:
    every rank of the group calls it when the plan has guests anywhere.
    """
    out = _Lend.apply(table, group, *home)
    return list(out[: len(home)]), list(out[len(home) :])


class _Tie(torch.autograd.Function):
    """Identity on y that makes it depend on the weights, so that every rank's backward reaches every collective.

    A rank without rows of its own still owes its peers the exchange of guests' gradients, and the sharding
    underneath the gradient of its parameters: zeros where nothing was computed.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, zero: tuple[bool, ...], *weights: Tensor) -> Tensor:
        ctx.zero = zero
        ctx.save_for_backward(*(w for w, z in zip(weights, zero, strict=True) if z))
        return y_ND.view_as(y_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        unused = iter(ctx.saved_tensors)
        return grad_ND, None, *(torch.zeros_like(next(unused)) if z else None for z in ctx.zero)


def tie(y_ND: Tensor, weights: Sequence[Tensor], unused: Sequence[bool]) -> Tensor:
    """y, depending on `weights`; those marked unused receive a zero gradient."""
    return _Tie.apply(y_ND, tuple(unused), *weights)
