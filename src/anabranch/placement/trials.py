"""Trying before choosing: the leading candidates run the call at hand, and what they took corrects their prices."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from anabranch.placement.choice import Choice, Exchange, Trial

# A candidate slower than the fastest by more than this is out: after its first run, which is cold, its second, its
# third.
FAR = (1.6, 1.3, 1.15)
# Later, one that is slower by more standard errors than SURE of the difference, if by more than NEAR.
SURE, NEAR = 2.0, 1.015
# Warm runs of those that are left: more only where their times are not known within SETTLED, a standard error.
LEAST, MOST = 3, 32
SETTLED = 0.01
# What a call aside tells of one within a step is off by this much, however often it ran.
ASIDE = 0.02
# Loads whose max/mean lies within one such factor share what was learnt: errors of prices grow with the skew.
BAND = 1.5
# How far prices are off one from another, as a fraction, where no trial told (bench cluster: docs/log.md).
PRICE_ERROR = 0.06

Pair = tuple[str, Exchange]


class Lesson(NamedTuple):
    """Of one pair under one band of loads: measured over predicted time, and the ratio's standard error."""

    ratio: float
    error: float


class Experience:
    """What trials told, by skew of the load, planner and exchange.

    The layers of one group share one, so that only the first of them has to try. Prices may all be too low or too
    high, by the median ratio of a band; beyond it a pair's own ratio counts as far as its error is small beside that
    of prices. On a noisy machine prices weigh more, on a quiet one trials; an untried pair has its price alone.
    """

    def __init__(self) -> None:
        self._lessons: dict[tuple[int, Pair], Lesson] = {}
        self.spent_ms = 0.0
        """What trials took, of all calls."""

    def knows(self, max_mean: float, pair: Pair) -> bool:
        """Whether the pair was tried under such a load."""
        return (_band(max_mean), pair) in self._lessons

    def correction(self, max_mean: float, pair: Pair) -> float:
        """What the price of the pair is to be multiplied by."""
        here = [lesson.ratio for (band, _), lesson in self._lessons.items() if band == _band(max_mean)]
        if not here:
            return 1.0
        usual, own = median(here), self._lessons.get((_band(max_mean), pair))
        if own is None:
            return usual
        trust = PRICE_ERROR**2 / (PRICE_ERROR**2 + own.error**2)
        return usual * (own.ratio / usual) ** trust

    def learn(
        self, max_mean: float, predicted_ms: Mapping[Pair, float], runs_ms: Mapping[Pair, Sequence[float]]
    ) -> None:
        """Take in a run-off beside the prices of the pairs that ran in it."""
        level = dict(zip(runs_ms, levelled(list(runs_ms.values())), strict=True))
        # Those that dropped out early have too few runs to tell their own spread.
        spreads = [_spread(runs) for runs in level.values() if len(runs) > LEAST]
        spread = median(spreads) if spreads else PRICE_ERROR
        for pair, runs in level.items():
            error = math.hypot(ASIDE, spread / math.sqrt(max(1, len(runs) - 1)))
            self._lessons[_band(max_mean), pair] = Lesson(
                _typical(runs) / max(predicted_ms[pair], 1e-9), error
            )
            self.spent_ms += sum(runs_ms[pair])

    def state(self) -> list[list[Any]]:
        """As JSON holds it."""
        return [
            [band, planner, *exchange, *told] for (band, (planner, exchange)), told in self._lessons.items()
        ]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Know, beside what is known, what another one's `state` tells."""
        for band, planner, transport, chunks, ratio, error in state:
            pair = (str(planner), Exchange(str(transport), int(chunks)))
            self._lessons[int(band), pair] = Lesson(float(ratio), float(error))


def run_off(choices: Sequence[Choice], trial: Trial) -> list[list[float]]:
    """ms of each run of each choice, interleaved; who falls behind clearly runs no more."""
    runs: list[list[float]] = [[] for _ in choices]
    racing = list(range(len(choices)))
    for turn in range(MOST + 1):
        for place in racing:
            runs[place].append(trial(choices[place]))
        level = dict(zip(racing, levelled([runs[place] for place in racing]), strict=True))
        best = min(level.values(), key=_typical)
        racing = [place for place in racing if not _behind(level[place], best)]
        settled = turn >= LEAST and all(_spread(level[place]) < SETTLED * math.sqrt(turn) for place in racing)
        if settled or (len(racing) == 1 and turn > 0):
            break
    return runs


def levelled(runs_ms: Sequence[Sequence[float]]) -> list[list[float]]:
    """Times of several things done in turns, each over how slow its turn was on a machine that others use too.

    A turn's slowness is that of those that took part in all turns, beside their own medians; of fewer than two of
    them nothing can be told, and times are left as they are.
    """
    turns = max(map(len, runs_ms))
    lasting = [runs for runs in runs_ms if len(runs) == turns]
    if len(lasting) < 2:
        return [list(runs) for runs in runs_ms]
    usual = [_typical(runs) for runs in lasting]
    slow = [median(runs[turn] / u for runs, u in zip(lasting, usual, strict=True)) for turn in range(turns)]
    return [[ms / slow[turn] for turn, ms in enumerate(runs)] for runs in runs_ms]


def contenders(priced_ms: Mapping[Pair, float], within: float, most: int) -> list[Pair]:
    """Who is worth a trial, cheapest first, as far as it lies within this fraction of the cheapest of all: first the
    cheapest pair of each exchange and of each planner, so that an error in the price of one of them is found out;
    then any others, since a planner and an exchange may suit each other better than prices know."""
    order = sorted(priced_ms, key=lambda pair: priced_ms[pair])
    of_planner, of_exchange = (dict[str, Pair](), dict[Exchange, Pair]())
    for planner, exchange in order:
        of_planner.setdefault(planner, (planner, exchange))
        of_exchange.setdefault(exchange, (planner, exchange))
    firsts = {*of_planner.values(), *of_exchange.values()}
    limit = priced_ms[order[0]] * (1.0 + within)
    near = [pair for pair in order if priced_ms[pair] <= limit]
    worth = sorted(near, key=lambda pair: pair not in firsts)[:most]
    return sorted(worth, key=near.index)


def _behind(runs_ms: Sequence[float], best_ms: Sequence[float]) -> bool:
    """Whether one is clearly slower than the best, after as many runs each."""
    slower, runs = _typical(runs_ms) / _typical(best_ms), len(runs_ms)
    if runs <= len(FAR):
        return slower > FAR[runs - 1]
    error = math.hypot(_spread(runs_ms), _spread(best_ms)) / math.sqrt(runs - 1)
    return slower > max(NEAR, 1.0 + SURE * error)


def _typical(runs_ms: Sequence[float]) -> float:
    """The median but for the first run, which is cold."""
    return median(runs_ms[1:] or runs_ms)


def _spread(runs_ms: Sequence[float]) -> float:
    """Standard deviation of the warm runs over their mean."""
    return stdev(runs_ms[1:]) / fmean(runs_ms[1:])


def _band(max_mean: float) -> int:
    return round(math.log(max(max_mean, 1.0)) / math.log(BAND))
