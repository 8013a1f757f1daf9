"""Dispatch and combine around known experts equal the direct weighted sum, whatever the plan.

Expert e here multiplies a row by e + 1, so that a row in the wrong slot shows. Shape suffixes: see
`anabranch/transport/base.py`; R ranks, E experts, S tokens of a rank, K experts a token.
"""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.guests import guest_experts
from anabranch.transport import TRANSPORTS, Domain, Seats, make_domain, make_transport
from run_distributed import RankPool

HIDDEN = 5


class Case(NamedTuple):
    """ids: one int64 (S, K) a rank. quota_RE: rows of expert e computed on rank d."""

    ids: list[IntArray]
    quota_RE: IntArray
    experts: int


class Seen(NamedTuple):
    """One rank's round trip. Errors are the largest differences from the direct sum."""

    output: float
    grad_x: float
    grad_weights: float
    rows_J: list[int]
    buffer_rows: int
    sent: int
    returned: int
    sent_far: int


def case(ranks: int, experts: int, tokens: list[int], top_k: int, seed: int, *, hot: bool = False) -> Case:
    """Random routing and a random plan: any rank computes any number of any expert's rows."""
    draw = np.random.default_rng(seed)
    ids = [draw.permuted(np.tile(np.arange(experts), (s, 1)), axis=1)[:, :top_k] for s in tokens]
    if hot:
        ids = [np.zeros_like(i) for i in ids]
    rows_E = sum(np.bincount(i.ravel(), minlength=experts) for i in ids)
    shares_ER = draw.dirichlet([0.3] * ranks, size=experts)
    quota_RE = np.stack([draw.multinomial(n, p) for n, p in zip(rows_E, shares_ER, strict=True)], axis=1)
    return Case(ids, quota_RE.astype(np.int64), experts)


def seats_of(plan: Plan) -> Seats:
    home_RL = np.full((plan.homes.ranks, plan.homes.slots), -1, dtype=np.int64)
    home_RL[plan.homes.rank_E, plan.homes.slot_E] = np.arange(plan.homes.experts)
    return Seats(np.concatenate([home_RL, guest_experts(plan)], axis=1), plan.homes.slots)


def domain(per_node: int) -> Domain:
    """All ranks, `per_node` on each node."""
    os.environ["GROUP_RANK"] = str(dist.get_rank() // per_node)
    try:
        assert dist.group.WORLD is not None
        return make_domain(dist.group.WORLD, torch.device("cpu"))
    finally:
        del os.environ["GROUP_RANK"]


def round_trip(name: str, case: Case, per_node: int = 4, chunks: int = 1) -> Seen:
    rank = dist.get_rank()
    homes = Homes.contiguous(case.experts, len(case.ids))
    counts_RE = np.stack([np.bincount(i.ravel(), minlength=case.experts) for i in case.ids])
    plan = Plan(counts_RE, case.quota_RE, homes, cap=int(case.quota_RE.sum(axis=1).max()))
    seats = seats_of(plan)
    transport = make_transport(name, domain(per_node))
    ids_SK = torch.from_numpy(case.ids[rank])
    torch.manual_seed(rank)
    x_SD, grad_SD = torch.randn(2, ids_SK.shape[0], HIDDEN, dtype=torch.float64).unbind()
    weights_SK = torch.rand(ids_SK.shape, dtype=torch.float64)
    direct = [t.clone().requires_grad_() for t in (x_SD, weights_SK)]
    routed = [t.clone().requires_grad_() for t in (x_SD, weights_SK)]

    expected_SD = direct[0] * (direct[1] * (ids_SK + 1)).sum(dim=1, keepdim=True)
    expected_SD.backward(grad_SD)

    routes = transport.route(plan, seats, ids_SK, chunks)
    factor_J = torch.from_numpy(seats.expert_RJ[rank] + 1).double()
    outputs, rows_CJ = [], []
    for route in routes:
        span = (routed[0][route.tokens], routed[1][route.tokens])
        rows_ND, weight_N = transport.dispatch(*span, route)()
        y_ND = rows_ND * factor_J[route.slots.slot_N].unsqueeze(-1)
        outputs.append(transport.combine(y_ND, weight_N, span[1], route)())
        rows_CJ.append(torch.diff(route.slots.ends_J, prepend=torch.zeros(1, dtype=torch.int32)))
    output_SD = torch.cat(outputs)
    output_SD.backward(grad_SD)
    return Seen(
        *(largest_difference(a, b) for a, b in [
            (output_SD, expected_SD), (routed[0].grad, direct[0].grad), (routed[1].grad, direct[1].grad)
        ]),
        torch.stack(rows_CJ).sum(dim=0).tolist(),
        sum(route.rows if not transport.fixed_size else rows_ND.shape[0] for route in routes),
        sum(sum(hop.sent) for route in routes for hop in route.hops),
        sum(sum(hop.returned) for route in routes for hop in route.hops),
        sum(hop.sent.inter for route in routes for hop in route.hops),
    )  # fmt: skip


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs.detach()).abs().max()) if ours.numel() else 0.0


def check(seen: list[Seen], name: str, case: Case) -> None:
    homes = Homes.contiguous(case.experts, len(case.ids))
    counts_RE = np.stack([np.bincount(i.ravel(), minlength=case.experts) for i in case.ids])
    plan = Plan(counts_RE, case.quota_RE, homes, cap=int(case.quota_RE.sum(axis=1).max()))
    expert_RJ = seats_of(plan).expert_RJ
    for rank, s in enumerate(seen):
        assert max(s.output, s.grad_x, s.grad_weights) < 1e-12, s
        rows_J = np.where(expert_RJ[rank] >= 0, case.quota_RE[rank][expert_RJ[rank]], 0)
        if TRANSPORTS[name].fixed_size:
            assert s.buffer_rows == plan.cap
            rows_J[-1] += plan.cap - rows_J.sum()  # the padding belongs to the last slot
        assert s.rows_J == rows_J.tolist()
        assert s.buffer_rows == rows_J.sum()


CASES = {
    "ragged": (2, 6, [7, 12], 2, 0),
    "ragged, four ranks": (4, 8, [5, 9, 3, 14], 3, 1),
    "another plan": (4, 8, [6, 6, 6, 6], 2, 2),
    "uneven experts": (4, 7, [8, 2, 5, 5], 2, 3),
    "a rank without experts": (4, 6, [4, 7, 6, 5], 2, 4),
    "a rank without tokens": (4, 8, [6, 0, 9, 4], 2, 5),
    "one rank has all tokens": (4, 8, [0, 0, 11, 0], 2, 6),
    "one expert a token": (2, 4, [9, 6], 1, 7),
    "all experts a token": (2, 4, [5, 3], 4, 8),
    "a single token": (2, 4, [1, 0], 2, 9),
    "no tokens at all": (2, 4, [0, 0], 2, 10),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_a_round_trip_is_the_weighted_sum(name: str, arguments, request) -> None:
    made = case(*arguments)
    pool: RankPool = request.getfixturevalue(f"ranks{arguments[0]}")
    check(pool.run(round_trip, name, made), name, made)


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("seed", range(3))
def test_all_rows_to_one_expert(name: str, seed: int, ranks4: RankPool) -> None:
    """K = 1, and every rank computes a share of expert 0 as its guest."""
    made = case(4, 8, [6, 3, 8, 5], 1, seed, hot=True)
    assert (made.quota_RE[:, 0] > 0).sum() > 1
    check(ranks4.run(round_trip, name, made), name, made)


def test_a_token_travels_once_to_a_rank(ranks2: RankPool) -> None:
    """Two ranks, every expert a token: all_to_all sends a row for each expert elsewhere, dedup one a token."""
    ids = [np.tile(np.arange(4), (s, 1)) for s in (5, 3)]
    quota_RE = np.array([[8, 8, 0, 0], [0, 0, 8, 8]])
    made = Case(ids, quota_RE, 4)
    sent = {name: [(s.sent, s.returned) for s in ranks2.run(round_trip, name, made)] for name in TRANSPORTS}
    assert sent["all_to_all"] == [(10, 6), (6, 10)]
    assert sent["dedup"] == [(5, 3), (3, 5)]
    assert sent["two_level"] == sent["dedup"]
    assert sent["all_gather"] == [(5, 5), (5, 5)]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", ["dedup", "two_level"])
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_nodes_and_chunks_change_nothing(name: str, arguments, chunks: int, request) -> None:
    """Four ranks as two nodes of two, two ranks as two nodes of one; tokens in one piece, and in three."""
    made = case(*arguments)
    pool: RankPool = request.getfixturevalue(f"ranks{arguments[0]}")
    check(pool.run(round_trip, name, made, max(1, arguments[0] // 2), chunks), name, made)


def test_a_token_travels_once_to_a_node(ranks4: RankPool) -> None:
    """Two nodes of two ranks, every expert a token: over the slow link dedup sends a token to each of two ranks."""
    ids = [np.tile(np.arange(4), (s, 1)) for s in (5, 3, 4, 2)]
    made = Case(ids, 14 * np.eye(4, dtype=np.int64), 4)
    far = {
        name: [s.sent_far for s in ranks4.run(round_trip, name, made, 2)]
        for name in ("all_to_all", "dedup", "two_level")
    }
    assert far == {"all_to_all": [10, 6, 8, 4], "dedup": [10, 6, 8, 4], "two_level": [5, 3, 4, 2]}
