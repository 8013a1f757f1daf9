"""From shares to whole rows, and from rows to tokens.

Shape suffixes: R source ranks, H home ranks that hold experts, E experts, S tokens of one source rank,
K experts a token.
"""

import numpy as np

from anabranch.workload.scene import FloatArray, IntArray, Scene


def even_rows(scene: Scene, tokens_R: IntArray) -> IntArray:
    """Counts (R, E) as equal as integers allow: per cell, per expert and per home rank.

    The rows of all ranks, laid end to end, are dealt to the experts in turn, one expert of each home rank
    after the other, so that the remainder too is spread over the ranks.
    """
    turn_E = np.lexsort((scene.home_E, np.arange(scene.experts) % scene.slots))
    end_R = np.cumsum(tokens_R) * scene.top_k
    dealt_RE = (end_R[:, None] - np.arange(scene.experts)[None, :] - 1) // scene.experts + 1
    counts_RE = np.empty((scene.ranks, scene.experts), dtype=np.int64)
    counts_RE[:, turn_E] = np.diff(dealt_RE, axis=0, prepend=0)
    return counts_RE


def whole_rows(scene: Scene, share_RE: FloatArray, tokens_R: IntArray) -> IntArray:
    """Counts (R, E) next to `share_RE * tokens_R`, with exact source totals.

    Each source rank routes tokens * K rows and at most one row a token to an expert; every home rank's
    load is within one row of its real-valued load.
    """
    real_RE = share_RE * tokens_R[:, None]
    # A share of exactly 1 must not lose its row to rounding error.
    counts_RE = np.floor(real_RE + 1e-9).astype(np.int64)
    part_RE = np.clip(real_RE - counts_RE, 0.0, None)
    short_R = tokens_R * scene.top_k - counts_RE.sum(axis=1)
    # Cells to round up, drawn in proportion to their fraction: the largest keys u ** (1 / w), in logarithms
    # (Efraimidis and Spirakis 2006).
    with np.errstate(divide="ignore"):
        key_RE = np.log(scene.fresh(5).random(part_RE.shape)) / part_RE
    place_RE = np.argsort(np.argsort(-key_RE, axis=1), axis=1)
    counts_RE += place_RE < short_R[:, None]
    _settle(scene, counts_RE, real_RE, tokens_R)
    return counts_RE


def _settle(scene: Scene, counts_RE: IntArray, real_RE: FloatArray, tokens_R: IntArray) -> None:
    """Move rows between home ranks, inside a source rank, until each home rank's load is rounded right."""
    starts = np.arange(0, scene.experts, scene.slots)
    real_H = np.add.reduceat(real_RE.sum(axis=0), starts)
    want_H = np.floor(real_H + 1e-9).astype(np.int64)
    want_H[np.argsort(want_H - real_H)[: int(counts_RE.sum() - want_H.sum())]] += 1
    off_H = np.add.reduceat(counts_RE.sum(axis=0), starts) - want_H
    assert off_H.sum() == 0, "every source rank's shares must sum to K"
    while off_H.any():
        giver, taker = int(off_H.argmax()), int(off_H.argmin())
        gives, takes = scene.homes_of(giver), scene.homes_of(taker)
        over_RE = counts_RE - real_RE
        give_RE = np.where(counts_RE[:, gives] > 0, over_RE[:, gives], -np.inf)
        open_RE = (counts_RE[:, takes] < tokens_R[:, None]) & (real_RE[:, takes] > 0)
        take_RE = np.where(open_RE, -over_RE[:, takes], -np.inf)
        gain_R = give_RE.max(axis=1) + take_RE.max(axis=1)
        source = int(gain_R.argmax())
        if gain_R[source] == -np.inf:  # every source is saturated: the rest is finer than rows
            return
        counts_RE[source, gives[give_RE[source].argmax()]] -= 1
        counts_RE[source, takes[take_RE[source].argmax()]] += 1
        off_H[giver] -= 1
        off_H[taker] += 1


def token_ids(counts_E: IntArray, top_k: int, rng: np.random.Generator) -> IntArray:
    """Ids (S, K) of distinct experts per token whose counts are `counts_E`.

    The experts' rows, laid end to end and wrapped every S rows (McNaughton's wrap-around rule, 1959), give
    each token K distinct experts since no expert has more than S rows. Random swaps between pairs of tokens
    then mix which experts occur together.
    """
    tokens = int(counts_E.sum()) // top_k
    order_E = rng.permutation(counts_E.shape[0])
    ids_SK = np.repeat(order_E, counts_E[order_E]).reshape(top_k, tokens).T.copy()
    for _ in range(2 * top_k):
        _swap_pairs(ids_SK, rng)
    return rng.permuted(ids_SK, axis=1)


def _swap_pairs(ids_SK: IntArray, rng: np.random.Generator) -> None:
    """Pair the tokens at random; each pair trades one expert where both tokens stay distinct."""
    tokens, top_k = ids_SK.shape
    half = tokens // 2
    pair = rng.permutation(tokens)
    left, right = pair[:half], pair[half : 2 * half]
    left_col, right_col = rng.integers(top_k, size=(2, half))
    left_id, right_id = ids_SK[left, left_col], ids_SK[right, right_col]
    clash = (ids_SK[right] == left_id[:, None]).any(axis=1) | (ids_SK[left] == right_id[:, None]).any(axis=1)
    trade = ~clash
    ids_SK[left[trade], left_col[trade]] = right_id[trade]
    ids_SK[right[trade], right_col[trade]] = left_id[trade]
