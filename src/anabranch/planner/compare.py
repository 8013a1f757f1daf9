"""Whether one cluster does the same work for less than another, and how sure that is.

Dollars of a step are USD/h x step seconds / 3600 / goodput, and the saving is 1 - left / right. Prices, step times and
goodputs are drawn: a price from all that were seen of its basis, today's the likeliest; a step from the calibration's
80 and 90 % intervals; goodput from its bounds. The errors of two clusters' steps are drawn as if independent: for one
model on two chips they correlate by -0.05 (1,049 pairs of published runs, each predicted unseen; +0.08 over the 350
pairs of one precision and software). Machine hours alone are compared: not energy, not people.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from anabranch.costs.bounds import Bounds, Column
from anabranch.costs.ownership import WITHOUT_LOSS
from anabranch.costs.training.calibration import Prediction
from anabranch.errors import ConfigError
from anabranch.hardware.price import Price

TARGET = 0.4
SURE = 0.9
# Normal scores of what lies within 80 and 90 %, on both sides of the middle.
SCORE_80, SCORE_90 = NormalDist().inv_cdf(0.9), NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class Offer:
    """One cluster for the work: steps of the same model, tokens and batch as the other's.

    price: of one of its `nodes`. mfu: share of the chips' dense peak at `step.step_s`. unseen: no run on this kind of
    chip was measured, as `Calibration.has_run` tells. Raises ConfigError naming what cannot be.
    """

    name: str
    chips: int
    nodes: int
    price: Price
    step: Prediction
    mfu: float
    unseen: bool
    goodput: Bounds[float] = WITHOUT_LOSS

    def __post_init__(self) -> None:
        if not 0.0 < self.mfu <= 1.0:
            raise ConfigError(f"{self.mfu:g} must be above 0 and at most 1", setting="mfu")
        if not self.price.usd_per_h.mid > 0.0:
            raise ConfigError(f"an hour of {self.name} for nothing is no offer", setting="price")
        if not 0.0 < self.goodput.low <= self.goodput.mid <= self.goodput.high <= 1.0:
            raise ConfigError(f"{tuple(self.goodput)} must rise from above 0 to at most 1", setting="goodput")

    @property
    def usd_per_h(self) -> Bounds[float]:
        """Of all nodes; low and high over all dates that the catalog has."""
        low, high = self.price.seen
        return Bounds(low, self.price.usd_per_h.mid, high).scaled(self.nodes)

    @property
    def usd_per_step(self) -> float:
        """In the middle of everything."""
        return self.usd_per_h.mid * self.step.step_s / 3600.0 / self.goodput.mid


class Range(NamedTuple):
    """So many of a hundred draws are between these."""

    low: float
    high: float


class Conditions(NamedTuple):
    """When the saving reaches a goal. Ratios are of left over right.

    price_ratio: of USD/h, now. price_for_goal: the highest that reaches it with all else in the middle. price_for_sure:
    the highest that reaches it in nine of ten draws of all else. mfu_ratio: as predicted. mfu_for_goal: the lowest that
    reaches it at today's prices. possible: the left chips could: their MFU would stay below 1.
    """

    goal: float
    price_ratio: float
    price_for_goal: float
    price_for_sure: float
    mfu_ratio: float
    mfu_for_goal: float
    possible: bool


class MfuPoint(NamedTuple):
    """Of the right cluster's MFU: what the left one needs to cost the same, and to save the goal.

    low and high by the lowest and the highest price ratio that were seen. Above 1 cannot be.
    """

    right: float
    even: Bounds[float]
    goal: Bounds[float]


class Shares(NamedTuple):
    """Of the variance of the cost ratio's logarithm: where the uncertainty comes from."""

    price: float
    step: float
    goodput: float


@dataclass(frozen=True)
class Comparison:
    """saving: of the left over the right cluster, 0.25 for a quarter less; below 0 it costs more.

    goal_probability: of saving `conditions.goal` or more. supported: both chips have measured runs; where not, the
    figures follow from other chips' runs, and `verdict` claims nothing. caveats: what the figures do not know.
    """

    left: Offer
    right: Offer
    median: float
    within80: Range
    within90: Range
    cheaper_probability: float
    goal_probability: float
    conditions: Conditions
    shares: Shares
    supported: bool
    caveats: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, the curve of MFUs included."""
        figures = {
            name: getattr(self, name) for name in ("median", "cheaper_probability", "goal_probability")
        }
        return figures | {
            "left": self.left.name,
            "right": self.right.name,
            "within80": list(self.within80),
            "within90": list(self.within90),
            "conditions": self.conditions._asdict() | {"told": list(self.conditions_told)},
            "shares": self.shares._asdict(),
            "supported": self.supported,
            "caveats": list(self.caveats),
            "verdict": self.verdict,
            "mfu_curve": [
                {"right": at.right, "even": at.even._asdict(), "goal": at.goal._asdict()}
                for at in self.mfu_curve()
            ],
        }

    @property
    def verdict(self) -> str:
        low, high = self.within90
        figures = (
            f"{self.left.name} saves {self.median:.0%} over {self.right.name} ({low:.0%} to {high:.0%} in 90 of "
            f"100 draws); {self.conditions.goal:.0%} or more in {100 * self.goal_probability:.0f} of 100"
        )
        return figures if self.supported else f"no saving is claimed, for lack of runs; a scenario: {figures}"

    @property
    def conditions_told(self) -> tuple[str, ...]:
        """Under which conditions the goal is reached, one sentence each."""
        needs, left, right = self.conditions, self.left.name, self.right.name
        mfu = f"its MFU is at least {needs.mfu_for_goal:.2f} of {right}'s (predicted: {needs.mfu_ratio:.2f})"
        return (
            f"{needs.goal:.0%} is saved if an hour of {left} costs at most {needs.price_for_goal:.2f} of {right}'s "
            f"(now {needs.price_ratio:.2f}); for nine of ten draws, at most {needs.price_for_sure:.2f}",
            f"or, at today's prices, if {mfu}" + ("" if needs.possible else ", which it cannot be"),
        )

    def mfu_curve(self, points: int = 20) -> list[MfuPoint]:
        """At MFUs of the right cluster from 1/points to 1."""
        left, right = self.left.usd_per_h, self.right.usd_per_h
        now = left.mid / right.mid
        even = self.left.mfu / self.right.mfu * self.left.usd_per_step / self.right.usd_per_step
        slopes = Bounds(even * left.low / right.high / now, even, even * left.high / right.low / now)
        rows = np.arange(1, points + 1) / points
        keep = 1.0 - self.conditions.goal
        return [MfuPoint(float(at), slopes.scaled(float(at)), slopes.scaled(float(at) / keep)) for at in rows]


def compare(
    left: Offer,
    right: Offer,
    draws: int = 20_000,
    seed: int = 0,
    *,
    goal: float = TARGET,
    correlation: float = 0.0,
) -> Comparison:
    """correlation: of the two steps' errors, in normal scores. Raises ConfigError naming what cannot be."""
    if not goal < 1.0:
        raise ConfigError(f"{goal:g} must be below 1", setting="goal")
    if not -1.0 <= correlation <= 1.0:
        raise ConfigError(f"{correlation:g} must be between -1 and 1", setting="correlation")
    random = np.random.default_rng(seed)
    score_2D = random.standard_normal((2, draws))
    score_2D[1] = correlation * score_2D[0] + np.sqrt(1.0 - correlation**2) * score_2D[1]
    price_2D, goodput_2D = random.random((2, draws)), random.random((2, draws))
    price, goodput = (
        np.log(triangular(part(left), u_2D[0]) / triangular(part(right), u_2D[1]))
        for part, u_2D in ((_prices, price_2D), (_goodputs, goodput_2D))
    )
    step = log_steps(left.step, score_2D[0]) - log_steps(right.step, score_2D[1])
    saving = 1.0 - np.exp(price + step - goodput)
    low90, low80, median, high80, high90 = (
        float(q) for q in np.quantile(saving, (0.05, 0.1, 0.5, 0.9, 0.95))
    )
    return Comparison(
        left,
        right,
        median=median,
        within80=Range(low80, high80),
        within90=Range(low90, high90),
        cheaper_probability=float(np.mean(saving > 0.0)),
        goal_probability=float(np.mean(saving >= goal)),
        conditions=_conditions(left, right, goal, np.exp(step - goodput)),
        shares=_shares(price, step, goodput),
        supported=not (left.unseen or right.unseen),
        caveats=_caveats(left, right),
    )


def _prices(offer: Offer) -> Bounds[float]:
    return offer.usd_per_h


def _goodputs(offer: Offer) -> Bounds[float]:
    return offer.goodput


def triangular(bounds: Bounds[float], quantile: Column) -> Column:
    """Quantiles of the triangular distribution from low to high with its peak at mid; mid where there is no spread."""
    low, mid, high = bounds
    if low == high:
        return np.full_like(quantile, mid)
    rising = low + np.sqrt(quantile * (high - low) * (mid - low))
    falling = high - np.sqrt((1.0 - quantile) * (high - low) * (high - mid))
    return np.where(quantile * (high - low) < mid - low, rising, falling)


def log_steps(step: Prediction, score: Column) -> Column:
    """Logarithms of seconds at normal scores: the predicted step at 0, the ends of its intervals at theirs.

    Between and beyond them it goes on in straight lines.
    """
    middle = np.log(step.step_s)
    return middle + np.where(
        score < 0.0,
        -_width(middle - np.log(step.within80.low), middle - np.log(step.within90.low), -score),
        _width(np.log(step.within80.high) - middle, np.log(step.within90.high) - middle, score),
    )


def _width(at80: float, at90: float, score: Column) -> Column:
    beyond = (at90 - at80) / (SCORE_90 - SCORE_80)
    return np.where(score <= SCORE_80, at80 * score / SCORE_80, at80 + beyond * (score - SCORE_80))


def _conditions(left: Offer, right: Offer, goal: float, rest: Column) -> Conditions:
    """rest: the cost ratio without prices, drawn."""
    now, mfu = left.usd_per_h.mid / right.usd_per_h.mid, left.mfu / right.mfu
    excess = left.usd_per_step / right.usd_per_step / (1.0 - goal)
    return Conditions(
        goal,
        price_ratio=now,
        price_for_goal=now / excess,
        price_for_sure=(1.0 - goal) / float(np.quantile(rest, SURE)),
        mfu_ratio=mfu,
        mfu_for_goal=mfu * excess,
        possible=left.mfu * excess <= 1.0,
    )


def _shares(price: Column, step: Column, goodput: Column) -> Shares:
    parts = np.array([np.var(price), np.var(step), np.var(goodput)])
    return Shares(*(parts / max(float(parts.sum()), np.finfo(np.float64).tiny)).tolist())


def _caveats(left: Offer, right: Offer) -> tuple[str, ...]:
    told = list[str]()
    for offer in (left, right):
        if offer.unseen:
            told.append(
                f"{offer.name}: no published run on its chip; its step follows from other chips' runs, with the errors "
                "of chips that were left out"
            )
        if offer.price.seen[0] == offer.price.seen[1]:
            told.append(f"{offer.name}: one {offer.price.basis} price is known, so none of its movement")
        elif offer.price.history:
            dates = sorted(f.date for f in (offer.price.usd_per_h, *offer.price.history) if f.date)
            told.append(f"{offer.name}: {offer.price.basis} prices from {dates[0]} to {dates[-1]}")
        if offer.goodput == WITHOUT_LOSS:
            told.append(f"{offer.name}: goodput 1, no failure is counted")
    if left.price.basis != right.price.basis:
        told.append(f"prices of two kinds are compared: {left.price.basis} and {right.price.basis}")
    told.append("machine hours alone: neither the work of porting nor of tuning is in it")
    return tuple(told)
