"""Which rows go where: from a plan to what one rank sends and receives.

Shape suffixes: R ranks of the expert-parallel group, E experts, G experts with at least one guest.

Locality first: of expert e, rank r computes min(counts[r, e], quota[r, e]) rows of its own. What sources
have left over (*supply*) meets what destinations still lack (*demand*) in the order of ranks: line up the
supply of e on a ruler, source after source, and the demand of e on a second ruler, destination after
destination; source r sends to destination d the overlap of their two stretches. Both rulers are equally
long, because a plan keeps the columns. Experts without guests go whole to their home.
"""

from typing import NamedTuple

import numpy as np

from anabranch.placement.base import IntArray, Plan


class _Rulers(NamedTuple):
    """For the experts with guests: rows kept local, and the stretches of each rank on both rulers."""

    expert_G: IntArray
    local_RG: IntArray
    supply_start_RG: IntArray
    supply_end_RG: IntArray
    demand_start_RG: IntArray
    demand_end_RG: IntArray


def send_RE(plan: Plan, rank: int) -> IntArray:
    """int64 (R destinations, E): rows of expert e that `rank` sends to each destination, itself included.

    Columns sum to `plan.counts_RE[rank]`; `send_RE(plan, r)[d]` equals `recv_RE(plan, d)[r]`.
    """
    sent_RE = np.zeros_like(plan.quota_RE)
    sent_RE[plan.homes.rank_E, np.arange(plan.homes.experts)] = plan.counts_RE[rank]
    rulers = _rulers(plan)
    sent_RG = _overlap(
        rulers.supply_start_RG[rank], rulers.supply_end_RG[rank], rulers.demand_start_RG, rulers.demand_end_RG
    )
    sent_RG[rank] += rulers.local_RG[rank]
    sent_RE[:, rulers.expert_G] = sent_RG
    return sent_RE


def recv_RE(plan: Plan, rank: int) -> IntArray:
    """int64 (R sources, E): rows of expert e that `rank` receives from each source, itself included.

    Columns sum to `plan.quota_RE[rank]`; `recv_RE(plan, d)[r]` equals `send_RE(plan, r)[d]`.
    """
    received_RE = plan.counts_RE * (plan.homes.rank_E == rank)
    rulers = _rulers(plan)
    received_RG = _overlap(
        rulers.demand_start_RG[rank], rulers.demand_end_RG[rank], rulers.supply_start_RG, rulers.supply_end_RG
    )
    received_RG[rank] += rulers.local_RG[rank]
    received_RE[:, rulers.expert_G] = received_RG
    return received_RE


class GuestRows(NamedTuple):
    """Rows of the G experts with guests. sent_RRG: what rank s sends to rank d, its own included."""

    expert_G: IntArray
    sent_RRG: IntArray


def guest_rows(plan: Plan) -> GuestRows:
    """`send_RE` of all ranks at once, for the experts with guests alone: the others go whole to their homes."""
    rulers = _rulers(plan)
    sent_RRG = _overlap(
        rulers.supply_start_RG[:, None],
        rulers.supply_end_RG[:, None],
        rulers.demand_start_RG,
        rulers.demand_end_RG,
    )
    ranks = np.arange(plan.homes.ranks)
    sent_RRG[ranks, ranks] += rulers.local_RG
    return GuestRows(rulers.expert_G, sent_RRG)


def _rulers(plan: Plan) -> _Rulers:
    home_rows_E = plan.quota_RE[plan.homes.rank_E, np.arange(plan.homes.experts)]
    expert_G = np.flatnonzero(home_rows_E < plan.counts_RE.sum(axis=0))
    counts_RG, quota_RG = plan.counts_RE[:, expert_G], plan.quota_RE[:, expert_G]
    local_RG = np.minimum(counts_RG, quota_RG)
    supply_RG, demand_RG = counts_RG - local_RG, quota_RG - local_RG
    supply_end_RG, demand_end_RG = supply_RG.cumsum(axis=0), demand_RG.cumsum(axis=0)
    return _Rulers(
        expert_G, local_RG, supply_end_RG - supply_RG, supply_end_RG, demand_end_RG - demand_RG, demand_end_RG
    )


def _overlap(start_G: IntArray, end_G: IntArray, start_RG: IntArray, end_RG: IntArray) -> IntArray:
    """Length of the common part of stretches and each of R others, per expert."""
    return np.maximum(np.minimum(end_G, end_RG) - np.maximum(start_G, start_RG), 0)
