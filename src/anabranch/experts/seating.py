"""Who sits where under a plan, and which weights must travel for it.

Shape suffixes: R ranks, E experts, L home slots, B guest slots, J = L + B slots.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import PlanError
from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.guests import guest_experts
from anabranch.transport.base import Seats


class GuestTable(NamedTuple):
    """The weight exchange of one plan, as seen by one rank.

    send_index: home slot packed at each place of the send buffer, destination-major.
    take_B: place in the receive buffer (source-major) of each of this rank's guests; in_order: they are 0..B-1.
    send_R, recv_R: experts sent to and received from each rank. copies: guests in the whole group.
    lent_U: the distinct home slots sent; place_G: which of them each place of the send buffer holds.
    """

    send_index: Tensor
    take_B: Tensor
    in_order: bool
    send_R: tuple[int, ...]
    recv_R: tuple[int, ...]
    lent_U: Tensor
    place_G: Tensor
    copies: int

    @property
    def experts_moved_R(self) -> IntArray:
        """Experts this rank sends to each rank, in forward and, as gradients, in backward."""
        return np.array(self.send_R) + np.array(self.recv_R)


def home_table(homes: Homes) -> IntArray:
    """int64 (R, L): the expert in each home slot, -1 where a slot is empty."""
    expert_RL = np.full((homes.ranks, homes.slots), -1, dtype=np.int64)
    expert_RL[homes.rank_E, homes.slot_E] = np.arange(homes.experts)
    return expert_RL


def seat(plan: Plan, guest_slots: int | None) -> Seats:
    """Homes first, then guests. `guest_slots` fixes B; None takes as many as the plan uses.

    Raises PlanError where the plan needs more than the fixed number of slots.
    """
    guest_RB = guest_experts(plan)
    if guest_slots is not None:
        if guest_RB.shape[1] > guest_slots:
            raise PlanError(
                f"the plan hosts {guest_RB.shape[1]} guests on a rank, but buffers hold {guest_slots}; "
                f"set slots={guest_RB.shape[1]} or use a transport without fixed buffers",
                setting="slots",
            )
        missing = guest_slots - guest_RB.shape[1]
        guest_RB = np.pad(guest_RB, ((0, 0), (0, missing)), constant_values=-1)
    return Seats(np.concatenate([home_table(plan.homes), guest_RB], axis=1), plan.homes.slots)


def guest_table(plan: Plan, seats: Seats, rank: int, *, fixed: bool, device: torch.device) -> GuestTable:
    """The exchange that seats the guests. `fixed` sends B experts to every rank, wanted or not: static shapes."""
    guest_RB = seats.expert_RJ[:, seats.homes :]
    build = _fixed_table if fixed else _exact_table
    send_index, take_B, send_R, recv_R = build(guest_RB, plan.homes, rank)
    if fixed:
        lent_U, place_G = np.arange(int((plan.homes.rank_E == rank).sum())), send_index
    else:
        lent_U, place_G = np.unique(send_index, return_inverse=True)
    return GuestTable(
        torch.from_numpy(send_index).to(device),
        torch.from_numpy(take_B).to(device),
        not fixed and bool((take_B == np.arange(take_B.size)).all()),
        tuple(int(n) for n in send_R),
        tuple(int(n) for n in recv_R),
        torch.from_numpy(lent_U).to(device),
        torch.from_numpy(place_G).to(device),
        int((guest_RB >= 0).sum()),
    )


def _exact_table(
    guest_RB: IntArray, homes: Homes, rank: int
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    wanted_RB = guest_RB >= 0
    owner_RB = np.where(wanted_RB, homes.rank_E[guest_RB], -1)
    mine_RB = owner_RB == rank
    send_index = homes.slot_E[guest_RB[mine_RB]]  # boolean reading is destination-major, guests in slot order
    owner_B = owner_RB[rank][wanted_RB[rank]]
    by_source = np.argsort(owner_B, kind="stable")
    take_B = np.empty_like(by_source)
    take_B[by_source] = np.arange(by_source.size)
    return send_index, take_B, mine_RB.sum(axis=1), np.bincount(owner_B, minlength=homes.ranks)


def _fixed_table(
    guest_RB: IntArray, homes: Homes, rank: int
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    slots = guest_RB.shape[1]
    owner_RB = np.where(guest_RB >= 0, homes.rank_E[guest_RB], -1)
    send_index = np.where(owner_RB == rank, homes.slot_E[guest_RB], 0).ravel()
    take_B = np.maximum(owner_RB[rank], 0) * slots + np.arange(slots)
    sizes_R = np.full(homes.ranks, slots)
    return send_index, take_B, sizes_R, sizes_R
