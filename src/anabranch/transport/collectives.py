"""Differentiable collectives over any process group, traceable by `torch.compile`.

Thin names over torch's functional collectives: each returns a finished tensor (waited on), so that no
pending result leaks into an experts kernel.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor


def exchange_plain(rows_P: Tensor, send_R: list[int], recv_R: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all along dim 0, without gradient: send_R[d] rows go to rank d, recv_R[s] come from s."""
    return functional.wait_tensor(functional.all_to_all_single(rows_P.contiguous(), recv_R, send_R, group))


def gather_rows(rows_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(S, ...) on each of R ranks to (R * S, ...) on all, rank-major. Backward is a reduce-scatter (sum)."""
    return functional.wait_tensor(functional.all_gather_single_autograd(rows_SD.contiguous(), 0, group))


def gather_plain(rows_S: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather_rows` for tensors without gradient."""
    return functional.wait_tensor(functional.all_gather_single(rows_S.contiguous(), 0, group))


def reduce_scatter_rows(rows_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(R * S, ...) on all ranks, summed, to each rank's (S, ...). Backward is an all-gather."""
    return functional.wait_tensor(
        functional.reduce_scatter_single_autograd(rows_TD.contiguous(), "sum", 0, group)
    )


def gather_counts(counts_E: Tensor, group: dist.ProcessGroup) -> Tensor:
    """int (E,) on each rank to int32 (R, E) on the host: the one host synchronisation of a layer's plan."""
    size = dist.get_world_size(group)
    counts_RE = torch.empty((size, counts_E.shape[0]), dtype=torch.int32, device=counts_E.device)
    dist.all_gather_single(counts_RE, counts_E.to(torch.int32).unsqueeze(0), group=group)
    return counts_RE.cpu()
