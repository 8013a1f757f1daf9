"""Guest weights are copies, and their gradients come home.

Shape suffixes: R ranks, E experts, L home slots, B guest slots.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.experts.guests import lend, tie
from anabranch.experts.seating import guest_table, seat
from anabranch.placement.base import Homes, IntArray, Plan
from run_distributed import RankPool


def coefficient(rank: int, expert: int, shape: torch.Size) -> Tensor:
    """What multiplies expert `expert` on `rank` in the loss, hence its gradient there."""
    draw = torch.Generator().manual_seed(int(100 * rank + expert))
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def parameters(experts: IntArray) -> list[Tensor]:
    """Two parameters that differ in rank and tell every expert apart."""
    ids = torch.from_numpy(experts).double()
    return [ids.view(-1, 1, 1) * 10 + torch.arange(6.0).view(3, 2), ids.view(-1, 1) - torch.arange(4.0)]


def lent_and_returned(quota_RE: IntArray, fixed: bool) -> tuple[float, float]:
    """Largest error of the guests' weights, and of the gradients at home."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    ranks, experts = quota_RE.shape
    homes = Homes.contiguous(experts, ranks)
    plan = Plan(quota_RE, quota_RE, homes, cap=int(quota_RE.sum()))
    most = int(plan.guest_RE.sum(axis=1).max())
    seats = seat(plan, most + 1 if fixed else None)
    table = guest_table(plan, seats, rank, fixed=fixed, device=torch.device("cpu"))
    owned = np.flatnonzero(homes.rank_E == rank)
    leaves = [p.requires_grad_() for p in parameters(owned)]

    home, guests = lend(leaves, table, group)
    hosted = seats.expert_RJ[rank, homes.slots :]
    hosted = hosted if fixed else hosted[hosted >= 0]
    assert all(p.shape[0] == hosted.shape[0] for p in guests)
    weight_error, loss = 0.0, torch.zeros((), dtype=torch.float64)
    for lent, known in zip(guests, parameters(hosted), strict=True):
        for slot, expert in enumerate(hosted):
            if expert >= 0:
                weight_error = max(weight_error, float((lent[slot] - known[slot]).detach().abs().max()))
                loss = loss + (lent[slot] * coefficient(rank, expert, lent.shape[1:])).sum()
    for own in home:
        for slot, expert in enumerate(owned):
            loss = loss + (own[slot] * coefficient(rank, expert, own.shape[1:])).sum()
    # As in the layer: whatever a rank computes, its backward passes through the exchange.
    tie(loss.view(1, 1), home + guests, [False] * (len(home) + len(guests))).sum().backward()

    gradient_error = 0.0
    for leaf in leaves:
        for slot, expert in enumerate(owned):
            users = {rank, *np.flatnonzero(plan.guest_RE[:, expert]).tolist()}
            expected = sum(coefficient(user, expert, leaf.shape[1:]) for user in sorted(users))
            gradient_error = max(gradient_error, float((leaf.grad[slot] - expected).abs().max()))
    return weight_error, gradient_error


QUOTAS = {
    "one guest": np.array([[3, 0, 2, 0], [1, 2, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
    "an expert hosted everywhere": np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0]]),
    "everything away from home": np.array([[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]),
    "the last rank owns nothing": np.array([[2, 1, 0, 0, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]),
}  # fmt: skip


@pytest.mark.parametrize("fixed", [False, True], ids=["exact sizes", "fixed sizes"])
@pytest.mark.parametrize("quota_RE", QUOTAS.values(), ids=QUOTAS.keys())
def test_weights_go_out_and_gradients_come_home(quota_RE: IntArray, fixed: bool, ranks4: RankPool) -> None:
    for weight_error, gradient_error in ranks4.run(lent_and_returned, quota_RE, fixed):
        assert weight_error == 0.0
        assert gradient_error < 1e-12


def sum_in_bfloat16() -> list[float]:
    """Expert 0 lives on rank 0; every rank's gradient is 256 there and 1 elsewhere."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    quota_RE = np.zeros((4, 4), dtype=np.int64)
    quota_RE[:, 0] = 1
    plan = Plan(quota_RE, quota_RE, Homes.contiguous(4, 4), cap=1)
    table = guest_table(plan, seat(plan, None), rank, fixed=False, device=torch.device("cpu"))
    leaf = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    home, guests = lend([leaf], table, group)
    used = home[0] * 256 if rank == 0 else guests[0]
    tie(used, home + guests, [False, False]).sum().backward()
    return [] if leaf.grad is None else leaf.grad.flatten().tolist()


def test_gradients_add_up_in_fp32(ranks4: RankPool) -> None:
    """256 + 1 + 1 + 1 = 259, rounded once to 260; adding in bf16 would stay at 256."""
    assert ranks4.run(sum_in_bfloat16)[0] == [260.0, 260.0]


def test_tie_gives_unused_weights_zero_gradients() -> None:
    y_ND = torch.ones(2, 3, requires_grad=True)
    unused, used = (torch.ones(n, 2, requires_grad=True) for n in (4, 1))
    tied_ND = tie(y_ND * used.sum(), [unused, used], [True, False])
    assert torch.equal(tied_ND, torch.full((2, 3), 2.0))
    tied_ND.sum().backward()
    assert torch.equal(unused.grad, torch.zeros(4, 2))
    assert torch.equal(used.grad, torch.full((1, 2), 6.0))
    assert torch.equal(y_ND.grad, torch.full((2, 3), 2.0))
