"""Which policies of a cell are measured once more: rounds go to the ratios that are still open."""

from collections.abc import Mapping, Sequence

import numpy as np

from anabranch.cli.cluster_rows import AUTO, IDEAL, TRANSFORMERS, Policy

# A policy beyond the first figure of the best fixed one after so many rounds is measured no further.
FAR = {1: 2.0, 2: 1.25}
NEAR = 1.08
LEAST = 3
# What a cell has to show: the time of `auto` over that of transformers, and over that of the best fixed choice.
LIMITS = {TRANSFORMERS: 1.02, "best": 1.05}
# A ratio is decided where it is this many standard errors from its limit, or known within SETTLED.
SURE = 2.0
SETTLED = 0.007

Times = Mapping[Policy, Sequence[float]]


def next_round(times: Times, most: int) -> list[Policy]:
    """Who is measured in the next round; none where the cell is decided, or after `most` rounds.

    times: step times of each policy, round by round; one that was left out never returns, so the rounds of two
    policies are the same ones as far as both have some. Everybody runs twice, except who takes more than twice the
    best fixed policy's time; then those within FAR of it, and from LEAST rounds on those within NEAR, `auto` and
    transformers. The ideal runs LEAST times, lossy rows, which only show their bytes, twice.
    """
    rounds = max(map(len, times.values()))
    still = [policy for policy, ms in times.items() if len(ms) == rounds]
    if rounds == 0:
        return still
    best = min((p for p in still if is_rival(p)), key=lambda p: float(np.median(times[p])))
    if rounds >= most or (rounds >= LEAST and _decided(times, best)):
        return []
    return [p for p in still if p is best or _goes_on(p, rounds, ratio(times, p, best))]


def is_rival(policy: Policy) -> bool:
    """Whether it is one of the fixed lossless choices, of which `auto` has to find the best."""
    return policy.name not in (AUTO, IDEAL) and policy.codec == "none"


def ratio(times: Times, one: Policy, other: Policy) -> float:
    """Time of one over that of the other: median over the rounds that both have."""
    return float(np.median(_ratios(times[one], times[other])))


def _goes_on(policy: Policy, rounds: int, to_best: float) -> bool:
    if policy.name in (AUTO, TRANSFORMERS):
        return True
    if policy.codec != "none":
        return rounds < 2
    if policy.name == IDEAL:
        return rounds < LEAST
    return to_best <= FAR.get(rounds, NEAR)


def _decided(times: Times, best: Policy) -> bool:
    (auto,), (theirs,) = ([p for p in times if p.name == name] for name in (AUTO, TRANSFORMERS))
    compared = {TRANSFORMERS: theirs, "best": best}
    return all(_clear(_ratios(times[auto], times[compared[name]]), limit) for name, limit in LIMITS.items())


def _ratios(one: Sequence[float], other: Sequence[float]) -> np.ndarray:
    rounds = min(len(one), len(other))
    return np.array(one[:rounds]) / np.array(other[:rounds])


def _clear(ratios: np.ndarray, limit: float) -> bool:
    error = float(ratios.std(ddof=1) / np.sqrt(ratios.size))
    return error < SETTLED or abs(float(np.median(ratios)) - limit) > SURE * error
