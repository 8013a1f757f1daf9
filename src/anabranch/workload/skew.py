"""Forms of unequal popularity, each with one dial.

A *family* maps heat in [0, 1] to shares: 0 is as even as the form allows, 1 as skewed as it goes. A form
that cannot reach a wanted skew with few hot experts offers wider families after the first.

Shape suffixes: R source ranks, E experts, K experts a token. share_E (or share_RE, where source ranks
differ) is the fraction of tokens that pick an expert: within [0, 1], summing to K over the experts.
"""

from collections.abc import Callable

import numpy as np

from anabranch.errors import ConfigError
from anabranch.workload.scene import FloatArray, IntArray, Scene

Family = Callable[[float], FloatArray]

# Zipf exponents found in natural routing stay below this; the last, fallback family goes to STEEPEST.
STEEP, STEEPEST = 1.5, 16.0
# How strongly the popular experts crowd on one rank, tried in this order: 0 deals them out at random.
LEANS = (0.0, 0.25, 0.5, 0.75, 1.0)


def capped_share(weight_RE: FloatArray, top_k: int) -> FloatArray:
    """Shares proportional to the weights, none above 1, every row summing to `top_k`.

    The share min(1, lift * weight) with the one lift that gives the sum: with the j heaviest experts
    capped, lift_j = (K - j) / (sum of the rest), and j is the smallest for which no share exceeds 1.
    Needs at least `top_k` positive weights in each row. weight_RE: (R, E); returns the same shape.
    """
    sorted_RE = -np.sort(-weight_RE, axis=1)
    rest_RE = np.cumsum(sorted_RE[:, ::-1], axis=1)[:, ::-1]
    j_K = np.arange(top_k)
    lift_RK = (top_k - j_K) / rest_RE[:, :top_k]
    fits_RK = lift_RK * sorted_RE[:, :top_k] <= 1.0
    # With exactly K positive weights left every share is 1: the last column always fits by definition.
    fits_RK[:, -1] = True
    lift_R = np.take_along_axis(lift_RK, fits_RK.argmax(axis=1)[:, None], axis=1)
    return np.minimum(1.0, lift_R * weight_RE)


def hot_experts(scene: Scene, hot: IntArray, even_E: FloatArray) -> Family:
    """From `even_E` to every token picking the hot experts as often as it can, the others what is left."""
    each = min(1.0, scene.top_k / hot.size)
    others_E = even_E.copy()
    others_E[hot] = 0.0
    left = scene.top_k - hot.size
    extreme_E = capped_share(others_E[None, :], left)[0] if left > 0 else np.zeros_like(even_E)
    extreme_E[hot] = each
    return lambda heat: (1.0 - heat) * even_E + heat * extreme_E


def even_share(scene: Scene) -> FloatArray:
    return np.full(scene.experts, scene.top_k / scene.experts)


def growing_hot_set(scene: Scene, first: int, order: IntArray) -> tuple[Family, ...]:
    """The `first` experts of `order`, then twice as many, up to all of them: few are tried before many."""
    sizes = [first]
    while sizes[-1] < order.size:
        sizes.append(min(2 * sizes[-1], order.size))
    return tuple(hot_experts(scene, order[:size], even_share(scene)) for size in sizes)


def zipf(scene: Scene, hot_rank: int, own_order: bool) -> tuple[Family, ...]:
    """Popularity ~ 1 / place ** s over all experts; heat raises s.

    With `own_order` every source rank has its own places, otherwise all share one. Random places hardly
    load one rank more than another, so later families move the popular places towards `hot_rank`.
    """
    key_RE = scene.fixed(3).random((scene.ranks if own_order else 1, scene.experts))
    away_E = (scene.home_E != hot_rank).astype(np.float64)

    def family(lean: float, steepest: float) -> Family:
        place_RE = np.argsort(np.argsort(key_RE + lean * away_E, axis=1), axis=1) + 1.0
        return lambda heat: capped_share(np.power(place_RE, -steepest * heat), scene.top_k)

    return (*(family(lean, STEEP) for lean in LEANS), family(LEANS[-1], STEEPEST))


def with_silence(scene: Scene, hot_rank: int) -> tuple[Family, ...]:
    """One rank and up to a quarter of every other rank's experts get nothing; `hot_rank` gets most."""
    live = _live_experts(scene, hot_rank)
    weight_E = np.zeros(scene.experts)
    for kept, homes in live:
        weight_E[kept] = homes / kept.size
    even_E = capped_share(weight_E[None, :], scene.top_k)[0]
    hot = scene.homes_of(hot_rank)
    return (hot_experts(scene, hot[even_E[hot] > 0], even_E),)


def _live_experts(scene: Scene, hot_rank: int) -> list[tuple[IntArray, int]]:
    """Of every rank that gets rows: its live experts, and how many it owns. At least K live ones in all."""
    rng = scene.fixed(4)
    owners = [int(rank) for rank in rng.permutation(scene.ranks) if scene.homes_of(int(rank)).size]
    silent_rank = next((rank for rank in owners if rank != hot_rank), None)
    homes = [rng.permutation(scene.homes_of(rank)) for rank in owners if rank != silent_rank]
    for muted in range(scene.slots // 4, -1, -1):
        kept = [ids[: max(1, ids.size - muted)] for ids in homes]
        if sum(ids.size for ids in kept) >= scene.top_k:
            return [(live, ids.size) for live, ids in zip(kept, homes, strict=True)]
    raise ConfigError(
        f"zero_load silences one rank of {scene.ranks} and leaves too few of {scene.experts} experts for "
        f"top_k={scene.top_k}: raise experts or ranks, or lower top_k",
        setting="top_k",
    )
