"""Drawing a token from a row of logits: what is asked, and the torch twin of draw.h.

Shape suffixes: W rows, V vocabulary, M candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.scheduling.sampling import Sampling

# Tokens sorted at first; a row whose settings need more is sorted whole.
CANDIDATES = 256


class Draw(NamedTuple):
    """row: of the logits. uniform: the random number, in [0, 1). seen: distinct tokens that a penalty is for."""

    row: int
    sampling: Sampling
    uniform: float
    seen: Sequence[int]


def draw_by_torch(logits_WV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each draw, on any device."""
    return [_drawn(logits_WV[draw.row], draw) for draw in draws]


def _drawn(logits_V: Tensor, draw: Draw) -> int:
    logits_V = penalised(logits_V, draw)
    if draw.sampling.greedy:
        return int(logits_V.argmax())
    ids_M, p_M = probabilities(logits_V, draw.sampling)
    until_M = p_M.cumsum(0, dtype=torch.float64)
    at = int(torch.searchsorted(until_M, draw.uniform * until_M[-1], right=True))
    return int(ids_M[min(at, len(ids_M) - 1)])


def penalised(logits_V: Tensor, draw: Draw) -> Tensor:
    """The logits with the penalty of what was seen; the same tensor where the penalty is 1."""
    penalty = draw.sampling.repetition_penalty
    if penalty == 1.0:
        return logits_V
    seen = torch.tensor(draw.seen, device=logits_V.device)
    of_seen = logits_V[seen]
    return logits_V.index_put((seen,), torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))


def probabilities(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens left by temperature, top-k, top-p and min-p, in their own order, and their unnormalised probabilities:
    ids_M, p_M."""
    scaled_V = logits_V.float() / sampling.temperature
    p_V = (scaled_V - scaled_V.max()).exp()
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return torch.arange(len(p_V), device=p_V.device), p_V
    wanted = min(max(CANDIDATES, sampling.top_k), len(p_V))
    p_M, ids_M = p_V.topk(wanted)
    kept = _kept(p_M, float(p_V.sum()), sampling)
    if kept == wanted < len(p_V) and kept != sampling.top_k:
        p_M, ids_M = p_V.sort(descending=True)
        kept = _kept(p_M, float(p_V.sum()), sampling)
    ids_M, order_M = ids_M[:kept].sort()
    return ids_M, p_M[order_M]


def _kept(p_M: Tensor, total: float, sampling: Sampling) -> int:
    """How many of the most probable tokens stay. top-p is taken of what top-k leaves, min-p of what both leave."""
    kept = min(sampling.top_k or len(p_M), len(p_M))
    if sampling.top_p < 1.0:
        whole = float(p_M[:kept].sum()) if sampling.top_k else total
        before_M = p_M[:kept].cumsum(0) - p_M[:kept]
        kept = int((before_M < sampling.top_p * whole).sum())
    if sampling.min_p > 0.0:
        kept = int((p_M[:kept] >= sampling.min_p * float(p_M[0])).sum())
    return max(kept, 1)
