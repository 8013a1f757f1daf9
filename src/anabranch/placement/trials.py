"""Trying before choosing: the leading candidates run the call at hand, and what they took corrects their prices."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from anabranch.placement.choice import Choice, Exchange, Trial

# The fewest measured repetitions that tell two candidates apart, after one that warms up.
REPEATS = 4
# A candidate slower than the fastest by more than this is out: after its first run, which is cold, its second, its
# third, any later one.
FAR = (1.6, 1.2, 1.1)
NEAR = 1.06
# Loads whose max/mean lies within one such factor share what was learnt: errors of prices grow with the skew.
BAND = 1.5

Pair = tuple[str, Exchange]


class Experience:
    """Measured time over predicted time, by skew of the load, planner and exchange.

    The layers of one group share one, so that only the first of them has to try. A pair that was never tried is
    believed to be as far from its price as the others of its band are in the median.
    """

    def __init__(self) -> None:
        self._ratio: dict[tuple[int, Pair], float] = {}
        self.spent_ms = 0.0
        """What trials took, of all calls."""

    def knows(self, max_mean: float, pair: Pair) -> bool:
        """Whether the pair was tried under such a load."""
        return (_band(max_mean), pair) in self._ratio

    def correction(self, max_mean: float, pair: Pair) -> float:
        """What the price of the pair is to be multiplied by."""
        known = self._ratio.get((_band(max_mean), pair))
        if known is not None:
            return known
        others = [ratio for (band, _), ratio in self._ratio.items() if band == _band(max_mean)]
        return median(others) if others else 1.0

    def learn(self, max_mean: float, pair: Pair, predicted_ms: float, runs_ms: Sequence[float]) -> None:
        """Take in what a pair took in a run-off, beside its price."""
        self._ratio[_band(max_mean), pair] = _typical(runs_ms) / max(predicted_ms, 1e-9)
        self.spent_ms += sum(runs_ms)

    def state(self) -> list[list[Any]]:
        """As JSON holds it."""
        return [
            [band, planner, *exchange, ratio] for (band, (planner, exchange)), ratio in self._ratio.items()
        ]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Know, beside what is known, what another one's `state` tells."""
        for band, planner, transport, chunks, ratio in state:
            self._ratio[int(band), (str(planner), Exchange(str(transport), int(chunks)))] = float(ratio)


def run_off(choices: Sequence[Choice], trial: Trial) -> list[list[float]]:
    """ms of each run of each choice, interleaved; who falls behind clearly runs no more."""
    runs: list[list[float]] = [[] for _ in choices]
    racing = list(range(len(choices)))
    for turn in range(REPEATS + 1):
        for place in racing:
            runs[place].append(trial(choices[place]))
        limit = min(_typical(runs[place]) for place in racing) * (FAR[turn] if turn < len(FAR) else NEAR)
        racing = [place for place in racing if _typical(runs[place]) <= limit]
        if len(racing) == 1 and turn > 0:
            break
    return runs


def contenders(priced_ms: Mapping[Pair, float], within: float, most: int) -> list[Pair]:
    """Who is worth a trial, cheapest first: the cheapest pair of each exchange and of each planner, so that an error
    in the price of one of them is found out, as far as it lies within this fraction of the cheapest of all."""
    order = sorted(priced_ms, key=lambda pair: priced_ms[pair])
    of_planner, of_exchange = (dict[str, Pair](), dict[Exchange, Pair]())
    for planner, exchange in order:
        of_planner.setdefault(planner, (planner, exchange))
        of_exchange.setdefault(exchange, (planner, exchange))
    firsts = {*of_planner.values(), *of_exchange.values()}
    limit = priced_ms[order[0]] * (1.0 + within)
    return [pair for pair in order if pair in firsts and priced_ms[pair] <= limit][:most]


def _typical(runs_ms: Sequence[float]) -> float:
    """The median but for the first run, which is cold."""
    return median(runs_ms[1:] or runs_ms)


def _band(max_mean: float) -> int:
    return round(math.log(max(max_mean, 1.0)) / math.log(BAND))
