"""The next token of each chain from its logits.

A chain's random numbers depend on its seed, its sample and its position only: not on the batch, the step or a
preemption. Shape suffixes: W rows, V vocabulary, M candidates.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from anabranch.scheduling.chain import Chain
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Part
from anabranch.serving.step.base import Int32

# Tokens sorted at first; a row whose settings need more is sorted whole.
CANDIDATES = 256
MASK64 = (1 << 64) - 1


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) of these three, by SplitMix64's mixing function (Steele et al., OOPSLA 2014)."""
    state = 0
    for part in (seed, sample, position):
        state = _mix((state + part + 0x9E3779B97F4A7C15) & MASK64)
    return (state >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def penalised(logits_V: Tensor, chain: Chain, since: Sequence[int] = ()) -> Tensor:
    """The logits with the penalty of what the chain and `since` hold; the same tensor where the penalty is 1."""
    penalty = chain.request.sampling.repetition_penalty
    if penalty == 1.0:
        return logits_V
    seen = torch.tensor(sorted({*chain.tokens, *since}), device=logits_V.device)
    of_seen = logits_V[seen]
    return logits_V.index_put((seen,), torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))


def probabilities(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Candidates and their unnormalised probabilities after temperature, top-k, top-p and min-p: ids_M, p_M.

    All tokens in their own order where nothing is cut, else the most probable first.
    """
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
    return ids_M[:kept], p_M[:kept]


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


def sample(logits_WV: Tensor, best_W: Int32, parts: Iterable[Part]) -> list[list[int]]:
    """The tokens that each part with wanted logits gets: those of its draft that are also drawn, and the one after.

    best_W: the most probable tokens, of unpenalised logits. Rows of a part follow each other, as its guesses do.
    """
    found: list[list[int]] = []
    row = 0
    for part in parts:
        if part.last:
            found.append(_agreed(logits_WV, best_W, row, part))
            row += 1 + len(part.draft)
    return found


def _agreed(logits_WV: Tensor, best_W: Int32, row: int, part: Part) -> list[int]:
    tokens: list[int] = []
    for i in range(1 + len(part.draft)):
        tokens.append(_next(logits_WV[row + i], int(best_W[row + i]), part.chain, tokens))
        if i < len(part.draft) and tokens[i] != part.draft[i]:
            break
    return tokens


def _next(logits_V: Tensor, best: int, chain: Chain, since: Sequence[int]) -> int:
    """since: tokens after the chain's own."""
    sampling = chain.request.sampling
    if sampling.greedy and sampling.repetition_penalty == 1.0:
        return best
    logits_V = penalised(logits_V, chain, since)
    if sampling.greedy:
        return int(logits_V.argmax())
    ids_M, p_M = probabilities(logits_V, sampling)
    until_M = p_M.cumsum(0, dtype=torch.float64)
    u = uniform(sampling.seed, chain.sample, len(chain.tokens) + len(since))
    at = int(torch.searchsorted(until_M, u * until_M[-1], right=True))
    return int(ids_M[min(at, len(ids_M) - 1)])
