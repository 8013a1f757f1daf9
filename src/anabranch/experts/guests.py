"""Guest weights: copies of hot experts, lent for one micro-batch, whose gradients return home.

Shape suffixes: L home slots, B guest slots, W elements of one expert over all its parameters,
G experts in a packed buffer.
"""

from collections.abc import Sequence

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
    def forward(ctx, send_index, take_B, send_R, recv_R, group, *home_L: Tensor):
        ctx.splits, ctx.group = (send_R, recv_R), group
        ctx.save_for_backward(send_index, take_B)
        ctx.shapes = [p.shape for p in home_L]
        packed_GW = torch.cat([p.flatten(1).index_select(0, send_index) for p in home_L], dim=1)
        arrived_GW = exchange_plain(packed_GW, list(send_R), list(recv_R), group)
        guests_BW = arrived_GW.index_select(0, take_B)
        guests = _unpack(guests_BW, ctx.shapes)
        return (*(p.view_as(p) for p in home_L), *guests)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        send_index, take_B = ctx.saved_tensors
        send_R, recv_R = ctx.splits
        count = len(ctx.shapes)
        grad_home, grad_guest = grads[:count], grads[count:]
        grad_BW = torch.cat([g.flatten(1) for g in grad_guest], dim=1)
        # Empty guest slots share a place with a real one; their gradient is zero, so adding is exact.
        returned_GW = grad_BW.new_zeros((sum(recv_R), grad_BW.shape[1])).index_add(0, take_B, grad_BW)
        home_GW = exchange_plain(returned_GW, list(recv_R), list(send_R), ctx.group)
        summed = _sum_at_home(grad_home, home_GW, send_index, send_R)
        return (None, None, None, None, None, *summed)


def _sum_at_home(
    grad_home: Sequence[Tensor], home_GW: Tensor, send_index: Tensor, send_R: Sequence[int]
) -> list[Tensor]:
    """Add the returned gradients, one rank after the other: within a rank no expert repeats, so no add races."""
    summed = []
    columns = home_GW.split([_inner(g) for g in grad_home], dim=1)
    for grad_L, returned_G in zip(grad_home, columns, strict=True):
        if grad_L.shape[0] == 0 or home_GW.shape[0] == 0:
            summed.append(grad_L)
            continue
        total_L = grad_L.flatten(1).to(torch.promote_types(grad_L.dtype, torch.float32), copy=True)
        for places, rows in zip(send_index.split(list(send_R)), returned_G.split(list(send_R)), strict=True):
            if places.shape[0]:
                total_L.index_add_(0, places, rows.to(total_L.dtype))
        summed.append(total_L.to(grad_L.dtype).view(grad_L.shape))
    return summed


def _inner(tensor_L: Tensor) -> int:
    """Elements of one expert, also where a rank holds none."""
    return int(torch.Size(tensor_L.shape[1:]).numel())


def _unpack(packed_BW: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """(B, W) to one contiguous (B, ...) tensor per parameter."""
    widths = [int(torch.Size(shape[1:]).numel()) for shape in shapes]
    parts = packed_BW.split(widths, dim=1)
    return [p.reshape(-1, *shape[1:]).contiguous() for p, shape in zip(parts, shapes, strict=True)]


def lend(
    home: Sequence[Tensor], table: GuestTable, group: dist.ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """(home parameters, guest parameters), each (L or B, ...), in the order given.

    Allocates one packed copy of the experts sent, one of those received, and the guests themselves; home
    parameters are passed through as views. In backward: one fp32 copy of each home gradient on ranks whose
    experts were lent. Collective: every rank of the group calls it when the plan has guests anywhere.
    """
    out = _Lend.apply(table.send_index, table.take_B, table.send_R, table.recv_R, group, *home)
    return list(out[: len(home)]), list(out[len(home) :])


class _Tie(torch.autograd.Function):
    """Identity on y that makes it depend on the weights, so that every rank's backward reaches every collective.

    A rank without rows of its own still owes its peers the exchange of guests' gradients, and the sharding
    underneath the gradient of its parameters: zeros where nothing was computed.
    """

    @staticmethod
    def forward(ctx, y_ND: Tensor, zero: tuple[bool, ...], *weights: Tensor):
        ctx.zero = zero
        ctx.save_for_backward(*(w for w, z in zip(weights, zero, strict=True) if z))
        return y_ND.view_as(y_ND)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        unused = iter(ctx.saved_tensors)
        return grad_ND, None, *(torch.zeros_like(next(unused)) if z else None for z in ctx.zero)


def tie(y_ND: Tensor, weights: Sequence[Tensor], unused: Sequence[bool]) -> Tensor:
    """y, depending on `weights`; those marked unused receive a zero gradient."""
    return _Tie.apply(y_ND, tuple(unused), *weights)
