"""What the slow loop promises, on any past load. R ranks, E experts, L home slots a rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anabranch.placement.base import Homes
from anabranch.placement.rehome import rehome

rows = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**9))


@given(ranks=st.integers(1, 6), past=st.lists(rows, min_size=1, max_size=24))
def test_every_expert_has_one_slot_and_no_rank_more_than_its_slots_or_the_fullest_more(
    ranks: int, past: list[int]
) -> None:
    past_E, homes = np.array(past, dtype=np.int64), Homes.contiguous(len(past), ranks)
    found = rehome(past_E, homes)
    places = set(zip(found.homes.rank_E.tolist(), found.homes.slot_E.tolist(), strict=True))
    assert len(places) == len(past)
    assert all(0 <= rank < ranks and 0 <= slot < homes.slots for rank, slot in places)
    before, after = (np.bincount(h.rank_E, past_E, ranks).max() for h in (homes, found.homes))
    assert after <= before
    assert found.moved == (found.homes.rank_E != homes.rank_E).sum()
    assert rehome(past_E, found.homes).moved == 0
