"""The adaptive layer around toy experts: recomputation, what observers see, and its promise about memory.

Expert e multiplies a row, element by element, by its one parameter of D numbers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anabranch.errors import PlanError
from anabranch.experts.adaptive import AdaptiveExperts, Observation
from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.choice import Exchange, FixedChoice
from anabranch.placement.policy import make_planner
from anabranch.transport import Domain, make_domain, make_transport
from run_distributed import RankPool

EXPERTS, TOP_K, TOKENS, HIDDEN = 4, 2, 12, 6


class CountingPlanner:
    """`exact`, and how often it was asked."""

    name = "counting"

    def __init__(self) -> None:
        self.exact = make_planner("exact")
        self.calls = 0

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        self.calls += 1
        return self.exact.plan(counts_RE, homes)

    def slots_needed(self, homes: Homes) -> int:
        return self.exact.slots_needed(homes)


def multiply(weights: Sequence[Tensor], rows_ND: Tensor, ends_J: Tensor, slot_N: Tensor) -> Tensor:
    return rows_ND * weights[0][slot_N]


def domain() -> Domain:
    assert dist.group.WORLD is not None
    return make_domain(dist.group.WORLD, torch.device("cpu"))


def layer(transport: str = "all_to_all", chunks: int = 1) -> tuple[AdaptiveExperts, CountingPlanner]:
    planner = CountingPlanner()
    homes = Homes.contiguous(EXPERTS, dist.get_world_size())
    chooser = FixedChoice(planner, Exchange(transport, chunks))
    transports = {transport: make_transport(transport, domain())}
    return AdaptiveExperts(domain().group, homes, chooser, transports, multiply), planner


def own_experts() -> Tensor:
    """This rank's share of the experts' parameters, which are e + 1, e + 1.1, ..."""
    whole_ED = torch.arange(1.0, EXPERTS + 1).unsqueeze(1) + torch.arange(HIDDEN) / 10
    return whole_ED.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()


def micro_batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights, different on every rank; expert 0 is in every token."""
    draw = torch.Generator().manual_seed(10 * index + dist.get_rank())
    x_SD = torch.randn(TOKENS, HIDDEN, generator=draw)
    second_S = torch.randint(1, EXPERTS, (TOKENS,), generator=draw)
    ids_SK = torch.stack([torch.zeros_like(second_S), second_S], dim=1)
    return x_SD.requires_grad_(), ids_SK, torch.rand(TOKENS, TOP_K, generator=draw)


def gradients_of(passes: Callable[[AdaptiveExperts, Tensor], None]) -> tuple[Tensor, int, int]:
    """The experts' gradient, the number of plans, and what is left in memory."""
    adaptive, planner = layer()
    home = own_experts()
    passes(adaptive, home)
    assert home.grad is not None
    return home.grad, planner.calls, len(adaptive.memory._entries)


def ten_at_once(adaptive: AdaptiveExperts, home: Tensor) -> None:
    """More micro-batches in flight than memory holds: two are planned anew."""
    losses = [recomputed(adaptive, home, *micro_batch(i)).square().sum() for i in range(10)]
    torch.stack(losses).sum().backward()


def one_after_the_other(adaptive: AdaptiveExperts, home: Tensor) -> None:
    for i in range(10):
        x_SD, ids_SK, weights_SK = micro_batch(i)
        adaptive([home], x_SD, ids_SK, weights_SK).square().sum().backward()


def recomputed(adaptive: AdaptiveExperts, home: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return checkpoint(lambda *args: adaptive([home], *args), x, ids, weights, use_reentrant=False)


def test_more_micro_batches_in_flight_than_memory_holds(ranks2: RankPool) -> None:
    plain, checkpointed = ranks2.run(gradients_of, one_after_the_other), ranks2.run(gradients_of, ten_at_once)
    for (grad, plans, _), (same, more_plans, left) in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(same, grad)
        assert (plans, more_plans) == (10, 12)
        assert left == 0, "a plan made while recomputing is nobody's to recall"


def oldest_first(sizes: list[int]) -> str:
    """Two forward passes, then backward in the same order."""
    adaptive, _ = layer()
    home = own_experts()
    batches = [[t[:size] for t in micro_batch(i)] for i, size in enumerate(sizes)]
    losses = [recomputed(adaptive, home, *batch).sum() for batch in batches]
    with pytest.raises((RuntimeError, PlanError)) as caught:
        losses[0].backward()
    return str(caught.value)


@pytest.mark.parametrize("sizes", [[TOKENS, TOKENS], [TOKENS, 5]], ids=["alike", "of other sizes"])
def test_backward_in_the_order_of_forward_is_refused(sizes: list[int], ranks2: RankPool) -> None:
    for said in ranks2.run(oldest_first, sizes):
        assert "activation_checkpointing: " in said
        assert "call backward on the latest micro-batch first" in said


def flip_a_tie() -> tuple[Tensor, Tensor, int]:
    """A router that decides a near tie otherwise when it is asked again."""
    adaptive, planner = layer()
    home = own_experts()
    x_SD, ids_SK, weights_SK = micro_batch(0)
    asked = []

    def route_and_compute(x: Tensor) -> Tensor:
        asked.append(x)
        choice = ids_SK.clone()
        if len(asked) > 1:
            choice[0, 1] = 1 + choice[0, 1] % (EXPERTS - 1)
        return adaptive([home], x, choice, weights_SK)

    checkpoint(route_and_compute, x_SD, use_reentrant=False).square().sum().backward()
    assert len(asked) == 2
    assert x_SD.grad is not None
    return x_SD.grad, direct_gradient(x_SD, ids_SK, weights_SK), planner.calls


def direct_gradient(x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor) -> Tensor:
    whole_ED = torch.arange(1.0, EXPERTS + 1).unsqueeze(1) + torch.arange(HIDDEN) / 10
    x = x_SD.detach().requires_grad_()
    (x * (weights_SK.unsqueeze(-1) * whole_ED[ids_SK]).sum(dim=1)).square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_a_recomputation_keeps_the_first_choice(ranks2: RankPool) -> None:
    for grad_SD, expected_SD, plans in ranks2.run(flip_a_tie):
        torch.testing.assert_close(grad_SD, expected_SD)
        assert plans == 1


def observe(transport: str) -> Observation:
    adaptive, _ = layer(transport)
    seen: list[Observation] = []
    adaptive.observers.append(seen.append)
    x_SD, ids_SK, weights_SK = micro_batch(0)
    adaptive([own_experts()], x_SD, ids_SK, weights_SK)
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("transport", ["all_to_all", "all_gather"])
def test_observers_see_the_plan_and_the_bytes(transport: str, ranks2: RankPool) -> None:
    """Expert 0 has half of all rows, so rank 0 hands some of it to rank 1."""
    seen = ranks2.run(observe, transport)
    plan = seen[0].plan
    assert plan.guest_RE.tolist() == [[False] * EXPERTS, [True, False, False, False]]
    row_bytes = HIDDEN * 4
    if transport == "all_to_all":
        # To and fro, forward and backward: the rows that change ranks, each counted where it is sent.
        leaving = plan.counts_RE.sum(axis=1) - np.array([local_rows(plan, rank) for rank in range(2)])
        assert [s.token_bytes for s in seen] == [2 * row_bytes * int(leaving.sum())] * 2
        # One expert of D numbers: lent by rank 0, its gradient returned by rank 1.
        assert [s.weight_bytes for s in seen] == [row_bytes, row_bytes]
    else:
        assert [s.token_bytes for s in seen] == [2 * row_bytes * 2 * TOKENS] * 2
        slots = Homes.contiguous(EXPERTS, 2).slots
        assert [s.weight_bytes for s in seen] == [2 * slots * row_bytes] * 2


def local_rows(plan: Plan, rank: int) -> int:
    """Rows that stay: experts at home, and the share of guests that the plan lets a rank compute itself."""
    return int(np.minimum(plan.counts_RE[rank], plan.quota_RE[rank]).sum())


def operands_are_homes() -> list[bool]:
    """Whether the experts' own parameters are the operands of the home computation, not copies."""
    group = dist.group.WORLD
    assert group is not None
    operands: list[Tensor] = []

    def record(weights: Sequence[Tensor], rows_ND: Tensor, ends_J: Tensor, slot_N: Tensor) -> Tensor:
        operands.append(weights[0])
        return multiply(weights, rows_ND, ends_J, slot_N)

    adaptive, _ = layer()
    adaptive.forward = record
    home = own_experts()
    adaptive([home], *micro_batch(0))
    return [w.data_ptr() == home.data_ptr() for w in operands]


def test_home_weights_stay_where_they_are(ranks2: RankPool) -> None:
    assert ranks2.run(operands_are_homes) == [[True], [True, False]]


def in_chunks(chunks: int, transport: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Output and gradients of a micro-batch whose exchange and computation overlap, and its guests."""
    adaptive, _ = layer(transport, chunks)
    seen: list[Observation] = []
    adaptive.observers.append(seen.append)
    home = own_experts()
    x_SD, ids_SK, weights_SK = micro_batch(0)
    y_SD = adaptive([home], x_SD, ids_SK, weights_SK)
    y_SD.square().sum().backward()
    assert x_SD.grad is not None
    assert home.grad is not None
    return y_SD.detach(), x_SD.grad, home.grad, seen[0].plan.guests


@pytest.mark.parametrize("transport", ["dedup", "two_level"])
@pytest.mark.parametrize("chunks", [2, 4, 2 * TOKENS])
def test_chunks_change_nothing(chunks: int, transport: str, ranks2: RankPool) -> None:
    """Also more chunks than tokens: some are empty."""
    whole, parts = (ranks2.run(in_chunks, c, transport) for c in (1, chunks))
    for (*expected, guests), (*found, _) in zip(whole, parts, strict=True):
        assert guests == 1
        torch.testing.assert_close(found, expected)
