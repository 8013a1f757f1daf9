"""Which policies of a cell are measured once more: rounds go to the ratios that are still open."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from anabranch.cli.cluster_rows import AUTO, IDEAL, TRANSFORMERS, Policy
from anabranch.cli.cluster_verdict import ratios_to_best

# A policy beyond this part of the best fixed one's time after so many rounds is measured no further.
FAR = {1: 1.4, 2: 1.25, 3: 1.15, 4: 1.12, 5: 1.1}
NEAR = 1.08
# Of a cell. Halves of three rounds, which the verdict compares, are a single one and two: 1.105 was once told so.
LEAST = 6
# Rows that no limit is about run so often: lossy ones, which are there for their bytes, and the ideal.
LOSSY_ROUNDS, IDEAL_ROUNDS = 2, 3
# What a cell has to show: the time of `auto` over that of transformers, and over that of the best fixed choice.
THEIRS, BEST = 1.02, 1.05
# A ratio is clear where it is this many standard errors below its limit, or below it and known within SETTLED. One
# above it is measured to the end: load from outside comes in bursts, which more rounds outweigh.
SURE = 2.0
SETTLED = 0.007


class Record(NamedTuple):
    """One policy so far, round by round: step times, and which plans and exchanges it ran, as something to compare."""

    step_ms: Sequence[float]
    program: Sequence[Hashable]


def next_round(records: Mapping[Policy, Record], most: int) -> list[Policy]:
    """Who is measured in the next round; none where the cell is clear, or after `most` rounds.

    One that was left out never returns, so two policies share their rounds as far as both have some. After each
    round those within FAR of the best fixed policy go on, after the last round that FAR names those within NEAR;
    and `auto`, and transformers as long as they are not clearly slower, LEAST rounds at least. Of fixed policies
    that ran the same program twice only the first goes on. The cell is clear, after LEAST rounds, where the figures
    that the verdict will tell of it are.
    """
    rounds = max(len(record.step_ms) for record in records.values())
    still = [policy for policy, record in records.items() if len(record.step_ms) == rounds]
    if rounds == 0:
        return still
    if rounds > 1:
        still = [p for n, p in enumerate(still) if not any(_same(records, p, q) for q in still[:n])]
    best = min(filter(is_rival, still), key=lambda p: float(np.median(records[p].step_ms)))
    if rounds >= most or (rounds >= LEAST and _clear_of_limits(records, best)):
        return []
    return [p for p in still if p is best or _goes_on(records, p, rounds, best)]


def is_rival(policy: Policy) -> bool:
    """Whether it is one of the fixed lossless choices, of which `auto` has to find the best."""
    return policy.name not in (AUTO, IDEAL) and policy.codec == "none"


def _same(records: Mapping[Policy, Record], one: Policy, other: Policy) -> bool:
    return is_rival(one) and is_rival(other) and records[one].program == records[other].program


def _goes_on(records: Mapping[Policy, Record], policy: Policy, rounds: int, best: Policy) -> bool:
    if policy.name == AUTO:
        return True
    if policy.name == TRANSFORMERS:
        return rounds < LEAST or not _clear_of_theirs(records)
    if policy.codec != "none":
        return rounds < LOSSY_ROUNDS
    if policy.name == IDEAL:
        return rounds < IDEAL_ROUNDS
    return float(np.median(_ratios(records[policy], records[best]))) <= FAR.get(rounds, NEAR)


def _clear_of_limits(records: Mapping[Policy, Record], best: Policy) -> bool:
    auto = _named(records, AUTO)
    found = auto.program == records[best].program  # it runs the best choice itself
    rivals = [records[policy].step_ms for policy in filter(is_rival, records)]
    ratios = ratios_to_best(auto.step_ms, rivals)
    return _clear_of_theirs(records) and _clear(ratios, BEST, 0.0 if found else SURE)


def _clear_of_theirs(records: Mapping[Policy, Record]) -> bool:
    return _clear(_ratios(_named(records, AUTO), _named(records, TRANSFORMERS)), THEIRS, SURE)


def _named(records: Mapping[Policy, Record], name: str) -> Record:
    (record,) = (record for policy, record in records.items() if policy.name == name)
    return record


def _ratios(one: Record, other: Record) -> np.ndarray:
    rounds = min(len(one.step_ms), len(other.step_ms))
    return np.array(one.step_ms[:rounds]) / np.array(other.step_ms[:rounds])


def _clear(ratios: np.ndarray, limit: float, sure: float) -> bool:
    error = float(ratios.std(ddof=1) / np.sqrt(ratios.size))
    return float(np.median(ratios)) + (0.0 if error < SETTLED else sure * error) < limit
