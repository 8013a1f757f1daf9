import numpy as np

from anabranch.placement.base import Homes
from anabranch.placement.guests import Guests, guest_experts, identity, most_foreign, plan_with
from anabranch.placement.load import load_of

HOMES = Homes.contiguous(4, 2)
COUNTS_RE = np.array([[10, 0, 1, 2], [10, 4, 0, 0]])
LOAD = load_of(COUNTS_RE, HOMES)


def test_the_identity_keeps_every_expert_at_home():
    plan = identity(COUNTS_RE, HOMES, LOAD, cap=24)
    assert plan.quota_RE.tolist() == [[20, 4, 0, 0], [0, 0, 1, 2]]
    assert plan.guests == 0


def test_guests_take_their_rows_from_home():
    homes = Homes.contiguous(3, 3)
    counts_RE = np.array([[9, 0, 0], [9, 0, 1], [0, 0, 0]])
    guests = Guests()
    guests.add(expert=0, rank=1, rows=5)
    guests.add(expert=0, rank=2, rows=6)
    plan = plan_with(guests, counts_RE, homes, load_of(counts_RE, homes), cap=7)
    assert plan.quota_RE.tolist() == [[7, 0, 0], [5, 0, 0], [6, 0, 1]]
    assert plan.fits


def test_most_on_a_rank():
    guests = Guests()
    assert guests.most_on_a_rank() == 0
    for expert, rank in ((0, 1), (1, 1), (2, 0)):
        guests.add(expert, rank, rows=1)
    assert guests.most_on_a_rank() == 2
    assert len(guests) == 3


def test_guest_experts_ascend_and_pad():
    homes = Homes.contiguous(4, 2)
    guests = Guests()
    for expert, rank in ((3, 0), (2, 0), (1, 1)):
        guests.add(expert, rank, rows=1)
    plan = plan_with(guests, COUNTS_RE, homes, load_of(COUNTS_RE, homes), cap=30)
    assert guest_experts(plan).tolist() == [[2, 3], [1, -1]]


def test_no_guests_need_no_slots():
    assert guest_experts(identity(COUNTS_RE, HOMES, LOAD, cap=24)).shape == (2, 0)


def test_most_foreign_counts_for_the_rank_that_owns_least():
    assert most_foreign(Homes.contiguous(5, 3)) == 4
    assert most_foreign(Homes.contiguous(5, 1)) == 0
    assert most_foreign(Homes.contiguous(2, 3)) == 2
