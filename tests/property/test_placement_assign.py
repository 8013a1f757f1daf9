"""What the assignment of rows promises, on any plan that keeps its columns. R ranks, E experts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anabranch.placement.assign import recv_RE, send_RE
from anabranch.placement.base import Homes, Plan
from anabranch.placement.guests import guest_experts


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any split of each expert's rows over the ranks, as no planner of ours would make it."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    homes = Homes.contiguous(experts, ranks)
    rows = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**6))
    flat = draw(st.lists(rows, min_size=ranks * experts, max_size=ranks * experts))
    counts_RE = np.array(flat, dtype=np.int64).reshape(ranks, experts)
    quota_RE = np.zeros_like(counts_RE)
    for expert, total in enumerate(counts_RE.sum(axis=0).tolist()):
        if draw(st.booleans()):
            quota_RE[homes.rank_E[expert], expert] = total
            continue
        cuts = sorted(draw(st.lists(st.integers(0, total), min_size=ranks - 1, max_size=ranks - 1)))
        quota_RE[:, expert] = np.diff([0, *cuts, total])
    return Plan(counts_RE, quota_RE, homes, cap=int(quota_RE.sum(axis=1).max()))


@given(plan=plans())
def test_senders_and_receivers_agree_on_every_row(plan):
    ranks = range(plan.homes.ranks)
    sent_RRE = np.stack([send_RE(plan, rank) for rank in ranks])
    received_RRE = np.stack([recv_RE(plan, rank) for rank in ranks])
    assert sent_RRE.dtype == received_RRE.dtype == np.int64
    assert sent_RRE.min() >= 0
    np.testing.assert_array_equal(sent_RRE, received_RRE.transpose(1, 0, 2))
    np.testing.assert_array_equal(sent_RRE.sum(axis=1), plan.counts_RE)
    np.testing.assert_array_equal(received_RRE.sum(axis=1), plan.quota_RE)


@given(plan=plans())
def test_no_more_rows_travel_than_must(plan):
    for rank in range(plan.homes.ranks):
        local_E = np.minimum(plan.counts_RE[rank], plan.quota_RE[rank])
        np.testing.assert_array_equal(send_RE(plan, rank)[rank], local_E)
        np.testing.assert_array_equal(recv_RE(plan, rank)[rank], local_E)


@given(plan=plans())
def test_rows_that_travel_keep_the_order_of_ranks(plan):
    """Of two sources, the lower one's rows of an expert never go to a higher destination than the other's."""
    ranks = plan.homes.ranks
    sent_RRE = np.stack([send_RE(plan, rank) for rank in range(ranks)])
    sent_RRE[range(ranks), range(ranks)] = 0
    for expert in range(plan.homes.experts):
        pairs = np.argwhere(sent_RRE[:, :, expert] > 0)
        assert (np.diff(pairs[:, 1]) >= 0).all()


@given(plan=plans())
def test_guest_slots_hold_just_the_guests(plan):
    experts_RB = guest_experts(plan)
    assert experts_RB.dtype == np.int64
    assert experts_RB.shape == (plan.homes.ranks, plan.guest_RE.sum(axis=1).max())
    for slots_B, guest_E in zip(experts_RB, plan.guest_RE, strict=True):
        held = np.flatnonzero(guest_E)
        np.testing.assert_array_equal(slots_B[: held.size], held)
        assert (slots_B[held.size :] == -1).all()
