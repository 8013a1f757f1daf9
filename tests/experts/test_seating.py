"""Seats and weight exchanges, by carrying the exchange out in numpy.

Shape suffixes: R ranks, E experts, J slots (L homes, then B guests), G experts in a buffer.
"""

import numpy as np
import pytest
import torch

from anabranch.errors import PlanError
from anabranch.experts.seating import GuestTable, guest_table, home_table, seat
from anabranch.placement.base import Homes, Plan

CPU = torch.device("cpu")


def random_plan(ranks: int, experts: int, seed: int) -> Plan:
    draw = np.random.default_rng(seed)
    quota_RE = draw.integers(0, 4, (ranks, experts)) * draw.integers(0, 2, (ranks, experts))
    return Plan(quota_RE, quota_RE, Homes.contiguous(experts, ranks), cap=int(quota_RE.sum(axis=1).max()))


def test_homes_sit_where_shard_0_puts_them() -> None:
    assert home_table(Homes.contiguous(7, 3)).tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]


def test_guests_sit_behind_homes_and_empty_slots_last() -> None:
    quota_RE = np.array([[5, 1, 0, 2], [0, 0, 3, 3]])
    plan = Plan(quota_RE, quota_RE, Homes.contiguous(4, 2), cap=8)
    assert seat(plan, None).expert_RJ.tolist() == [[0, 1, 3], [2, 3, -1]]
    assert seat(plan, 3).expert_RJ.tolist() == [[0, 1, 3, -1, -1], [2, 3, -1, -1, -1]]
    assert (seat(plan, 3).homes, seat(plan, 3).guests) == (2, 3)


def test_a_plan_with_more_guests_than_slots_is_refused() -> None:
    quota_RE = np.array([[1, 0, 1, 1], [0, 0, 1, 1]])
    plan = Plan(quota_RE, quota_RE, Homes.contiguous(4, 2), cap=3)
    with pytest.raises(
        PlanError, match="hosts 2 guests on a rank, but buffers hold 1; set slots=2"
    ) as caught:
        seat(plan, 1)
    assert caught.value.setting == "slots"


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_exchange_brings_each_rank_its_guests(fixed: bool, seed: int) -> None:
    ranks, experts = [(2, 4), (4, 8), (4, 6), (3, 7)][seed % 4]
    plan = random_plan(ranks, experts, seed)
    most = int(plan.guest_RE.sum(axis=1).max())
    seats = seat(plan, most + seed % 2 if fixed else None)
    tables = [guest_table(plan, seats, rank, fixed=fixed, device=CPU) for rank in range(ranks)]
    own = home_table(plan.homes)
    for rank, table in enumerate(tables):
        arrived_G = np.concatenate([sent(tables[source], own[source], rank) for source in range(ranks)])
        assert arrived_G.size == sum(table.recv_R)
        hosted = seats.expert_RJ[rank, seats.homes :]
        taken = arrived_G[table.take_B.numpy()]
        wanted = hosted >= 0
        assert taken.size == (hosted.size if fixed else wanted.sum())
        assert (taken[: wanted.sum()] == hosted[wanted]).all()
        assert table.copies == plan.guests
        if own[rank][0] >= 0:  # a rank without experts sends padding only
            assert (table.lent_U[table.place_G] == table.send_index).all()
        if table.in_order:
            assert (table.take_B == torch.arange(table.take_B.shape[0])).all()
        if fixed:
            assert set(table.send_R) == set(table.recv_R) == {seats.guests}


def sent(table: GuestTable, own_L: np.ndarray, to: int) -> np.ndarray:
    """Ids of the experts that a rank with these homes packs for rank `to`."""
    first = sum(table.send_R[:to])
    return own_L[table.send_index.numpy()][first : first + table.send_R[to]]
