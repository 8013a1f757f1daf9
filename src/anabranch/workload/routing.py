"""The named stress workloads W0-W7: routed rows and token-level top-k ids at a wanted rank max/mean.

Shape suffixes: R ranks (as sources of tokens), E experts, S tokens of one source rank, K experts a token.
A *row* is one (token, expert) pair. Rank max/mean is the load of the fullest home rank over the mean load
under contiguous homes (expert e on rank e // ceil(E / R)). Everything is a function of the arguments: the
seed decides which experts are hot, the step which tokens a micro-batch holds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from anabranch.errors import ConfigError
from anabranch.workload.rows import even_rows, token_ids, whole_rows
from anabranch.workload.scene import FloatArray, IntArray, Scene, contiguous_max_mean
from anabranch.workload.skew import Family, even_share, growing_hot_set, hot_experts, with_silence, zipf

# W7 is balanced but for the last of every BURST_EVERY micro-batches.
BURST_EVERY = 4
# How far a source rank leans to one of a pair of experts, at most, as a part of the smaller share.
SOURCE_NOISE = 0.3
# W4: tokens of the smallest and of the largest source rank over the mean.
RAGGED = (0.25, 1.75)
# The asked max/mean may lie this far outside what the form reaches; rounding to rows takes the rest of 2 %.
REACH_TOLERANCE = 0.01


class Workload(NamedTuple):
    """A named form of routing. `families` is empty where the routing is exactly even."""

    code: str
    name: str
    summary: str
    families: Callable[[Scene], tuple[Family, ...]]


def _hot_rank(scene: Scene) -> int:
    return int(scene.fixed(1).integers(scene.full_ranks))


def _even(scene: Scene) -> tuple[Family, ...]:
    return ()


def _hot_set(scene: Scene) -> tuple[Family, ...]:
    order = scene.fixed(2).permutation(scene.homes_of(_hot_rank(scene)))
    return growing_hot_set(scene, min(max(1, scene.experts // 16), order.size), order)


def _hot_rank_whole(scene: Scene) -> tuple[Family, ...]:
    return (hot_experts(scene, scene.homes_of(_hot_rank(scene)), even_share(scene)),)


def _spread(scene: Scene) -> tuple[Family, ...]:
    return zipf(scene, _hot_rank(scene), own_order=False)


def _ragged_sources(scene: Scene) -> tuple[Family, ...]:
    return zipf(scene, _hot_rank(scene), own_order=True)


def _zero_load(scene: Scene) -> tuple[Family, ...]:
    return with_silence(scene, _hot_rank(scene))


def _rotating(scene: Scene) -> tuple[Family, ...]:
    rank = (_hot_rank(scene) + scene.step) % scene.full_ranks
    order = np.roll(scene.fixed(2).permutation(scene.homes_of(rank)), scene.step)
    return growing_hot_set(scene, min(max(1, scene.experts // 16), order.size), order)


def _burst(scene: Scene) -> tuple[Family, ...]:
    if scene.step % BURST_EVERY != BURST_EVERY - 1:
        return ()
    return growing_hot_set(scene, 1, scene.fixed(2).permutation(scene.homes_of(_hot_rank(scene))))


_ALL = (
    Workload("W0", "balanced", "every expert gets the same rows, as far as integers allow", _even),
    Workload(
        "W1",
        "hot_set",
        "a few hot experts on one rank (E / 16; more only where the target needs it)",
        _hot_set,
    ),
    Workload("W2", "hot_rank", "all experts of one rank are equally hot", _hot_rank_whole),
    Workload("W3", "spread", "popularity falls as a power law over all experts", _spread),
    Workload("W4", "ragged_sources", "source ranks differ in tokens and in mix", _ragged_sources),
    Workload("W5", "zero_load", "one rank and some experts of the others get nothing", _zero_load),
    Workload("W6", "rotating", "the hot set moves with each micro-batch", _rotating),
    Workload(
        "W7", "burst", f"balanced; in one of {BURST_EVERY} micro-batches one expert is very hot", _burst
    ),
)
WORKLOADS: dict[str, Workload] = {workload.code: workload for workload in _ALL}
_BY_NAME = {workload.name: workload for workload in _ALL}


def find_workload(name: str) -> Workload:
    """The workload of a code ("W1") or name ("hot_set"). Raises ConfigError for any other."""
    found = WORKLOADS.get(name) or _BY_NAME.get(name)
    if found is None:
        known = ", ".join(f"{w.code} ({w.name})" for w in _ALL)
        raise ConfigError(f"no workload is called {name!r}; there are {known}", setting="workload")
    return found


def routing_counts(
    name: str, *, ranks: int, experts: int, tokens: int, top_k: int, max_mean: float, step: int = 0, seed: int = 0
) -> IntArray:  # fmt: skip
    """Rows that each source rank routes to each expert: int64 (R, E).

    tokens: tokens a source rank, the mean over ranks for W4. max_mean: the wanted rank max/mean, met within
    2 % or one row, whichever is more; W0 and the calm micro-batches of W7 ignore it. Raises ConfigError for
    an unknown name, impossible sizes, and a max_mean out of the workload's reach.
    """
    return _counts(find_workload(name), Scene(ranks, experts, tokens, top_k, seed, step), max_mean)


def routing_ids(
    name: str, *, ranks: int, experts: int, tokens: int, top_k: int, max_mean: float, step: int = 0, seed: int = 0
) -> list[IntArray]:  # fmt: skip
    """Token-level top-k ids, one int64 (S, K) array a source rank; distinct experts within each token.

    S is `tokens` for every rank but in W4. Counting the ids gives `routing_counts` of the same arguments.
    Raises what `routing_counts` raises.
    """
    scene = Scene(ranks, experts, tokens, top_k, seed, step)
    counts_RE = _counts(find_workload(name), scene, max_mean)
    streams = scene.fresh(7).spawn(ranks)
    return [token_ids(counts_E, top_k, stream) for counts_E, stream in zip(counts_RE, streams, strict=True)]


def reachable_max_mean(
    name: str, *, ranks: int, experts: int, tokens: int, top_k: int, step: int = 0, seed: int = 0
) -> tuple[float, float]:
    """The lowest and highest max_mean that this workload can have with these sizes.

    Raises ConfigError as `routing_counts` does. A workload that ignores max_mean has one value for both.
    """
    workload, scene = find_workload(name), Scene(ranks, experts, tokens, top_k, seed, step)
    return _reach(scene, _tokens(scene, workload), workload.families(scene))


def _counts(workload: Workload, scene: Scene, max_mean: float) -> IntArray:
    tokens_R = _tokens(scene, workload)
    families = workload.families(scene)
    if not families:
        return even_rows(scene, tokens_R)
    for family in families:
        load = _load(scene, tokens_R, family)
        if load(0.0) <= max_mean * (1 + REACH_TOLERANCE) and max_mean <= load(1.0) * (1 + REACH_TOLERANCE):
            # With one rank max/mean is 1 at every heat: take the middle.
            heat = 0.5 if scene.ranks == 1 else _heat_for(load, max_mean)
            return whole_rows(scene, _with_preferences(scene, tokens_R, family(heat)), tokens_R)
    low, high = _reach(scene, tokens_R, families)
    raise _out_of_reach(workload, scene, max_mean, low, high)


def _reach(scene: Scene, tokens_R: IntArray, families: tuple[Family, ...]) -> tuple[float, float]:
    loads = [_load(scene, tokens_R, family) for family in families or (lambda heat: even_share(scene),)]
    return min(load(0.0) for load in loads), max(load(1.0) for load in loads)


def _tokens(scene: Scene, workload: Workload) -> IntArray:
    """Tokens of each source rank, `ranks * tokens` in all."""
    if workload.code != "W4" or scene.ranks == 1:
        return np.full(scene.ranks, scene.tokens, dtype=np.int64)
    weight_R = scene.fixed(6).permutation(np.linspace(*RAGGED, scene.ranks))
    end_R = np.round(np.cumsum(weight_R) * scene.tokens).astype(np.int64)
    return np.diff(end_R, prepend=0)


def _with_preferences(scene: Scene, tokens_R: IntArray, share_RE: FloatArray) -> FloatArray:
    """The shares (R, E), with every source rank preferring some experts at the expense of others.

    Experts are paired at random; a source rank moves part of its share from one of a pair to the other, and
    over the source ranks the moves cancel out. So rows of a source and rows of an expert stay as they are,
    and with them max/mean; silent experts stay silent.
    """
    share_RE = np.broadcast_to(share_RE, (scene.ranks, scene.experts)).copy()
    rng = scene.fresh(8)
    left_P, right_P = rng.permutation(scene.experts)[: scene.experts // 2 * 2].reshape(2, -1)
    lean_RP = rng.uniform(-SOURCE_NOISE, SOURCE_NOISE, (scene.ranks, left_P.size))
    lean_RP -= tokens_R @ lean_RP / tokens_R.sum()
    pair_RXP = share_RE[:, [left_P, right_P]]
    room_P = np.minimum(pair_RXP, 1.0 - pair_RXP).min(axis=(0, 1))
    share_RE[:, left_P] += lean_RP * room_P
    share_RE[:, right_P] -= lean_RP * room_P
    return share_RE


def _load(scene: Scene, tokens_R: IntArray, family: Family) -> Callable[[float], float]:
    """Rank max/mean that a family has at a heat."""

    def load(heat: float) -> float:
        share_RE = np.broadcast_to(family(heat), (scene.ranks, scene.experts))
        return contiguous_max_mean(tokens_R @ share_RE, scene.ranks)

    return load


def _heat_for(load: Callable[[float], float], max_mean: float) -> float:
    """A heat at which the load is `max_mean`, or the nearer end of [0, 1]: bisection on a continuous load."""
    cool, hot = 0.0, 1.0
    for _ in range(30):
        middle = (cool + hot) / 2
        if load(middle) < max_mean:
            cool = middle
        else:
            hot = middle
    return hot


def _out_of_reach(workload: Workload, scene: Scene, max_mean: float, low: float, high: float) -> ConfigError:
    return ConfigError(
        f"{max_mean:g} is out of reach of {workload.code} ({workload.name}) with ranks={scene.ranks}, "
        f"experts={scene.experts}, top_k={scene.top_k}: choose a value from "
        f"{low:.3f} to {high:.3f}",
        setting="max_mean",
    )
