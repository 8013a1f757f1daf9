"""The choice by price: now and then every plan with every exchange is priced, and the cheapest is kept.

Shape suffixes: R ranks of the expert-parallel group, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from anabranch.errors import ConfigError
from anabranch.placement.base import Homes, IntArray, Plan, Planner, max_over_mean
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.checks import require_count, require_number
from anabranch.placement.choice import Choice, Exchange, Trial
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.load import load_of
from anabranch.placement.nodes import Nodes
from anabranch.placement.prices import Prices
from anabranch.placement.static import StaticPlanner
from anabranch.placement.trials import PRICE_ERROR, Experience, Pair, contenders, run_off
from anabranch.placement.within_node import WithinNode

# Rank max/mean may move by this part of itself before the kept choice is doubted.
DRIFT = 0.10
# Candidates within this part of the cheapest are a tie, which the simplest wins.
TIE = 0.015
# The fewest calls between two reviews. A load that jumps to and fro would else be reviewed at every call.
SOONEST = 2
# Candidates dearer than the cheapest by more than this part of its price are not tried, nor more than so many: prices
# err by 5 % in the median (docs/log.md).
WITHIN = 0.25
TRIED = 6
# Trials of one review: the first may bring a pair to the front that was not tried.
TRIALS = 2


class Candidate(NamedTuple):
    """One priced way to do a call. guests: copies in its plan. expected_ms: its price, corrected by trials; of an
    exchange in chunks that was not tried, with its error on top."""

    planner: str
    exchange: Exchange
    guests: int
    predicted_ms: float
    expected_ms: float

    @property
    def pair(self) -> Pair:
        return self.planner, self.exchange


class CheapestChoice:
    """Keeps one planner and one exchange, and reviews them by price.

    A review prices every planner's plan with every exchange on the exact counts at hand. Where the cheapest pair has
    not been tried under such a load, it and the other `contenders` do the call at hand a few times; what they took
    corrects their prices from then on (`Experience`). The kept pair gives way only where one is cheaper by more than
    `hysteresis`, a fraction: prices are predictions, and changing to and fro gains nothing. It gives way to the
    simplest of those within TIE of the cheapest. Between reviews only the kept planner runs.

    Reviews come every `review_every` calls, and early when rank max/mean of the homes' load has moved by more than
    DRIFT since the last one: prices follow the load. An early review that changes nothing doubles the calls until
    the next early one may come, up to `review_every`, so that bursts which the kept pair already suits cost no
    planning; a change brings it back to SOONEST.

    Everything follows from the counts of the calls so far, the prices and the times of trials, which are equal on all
    ranks.
    """

    def __init__(
        self,
        planners: Mapping[str, Planner],
        exchanges: Sequence[Exchange],
        prices: Prices,
        hysteresis: float = 0.03,
        review_every: int = 16,
        experience: Experience | None = None,
    ) -> None:
        """planners: by the name that prices know them by. exchanges: the simplest first.
        experience: shared with other layers of the same prices; its own without one.

        Raises ConfigError naming the setting that is empty or out of range.
        """
        if not planners or not exchanges:
            empty = "exchanges" if planners else "planners"
            raise ConfigError("there is nothing to choose from; give at least one", setting=empty)
        require_number("hysteresis", hysteresis, 0.0)
        require_count("review_every", review_every, 1)
        self.planners, self.exchanges, self.prices = dict(planners), tuple(exchanges), prices
        self.hysteresis, self.review_every = hysteresis, review_every
        self.experience = Experience() if experience is None else experience
        self.review: tuple[Candidate, ...] = ()
        """All candidates of the last review, with their predicted times."""
        self._kept: tuple[str, Exchange] | None = None
        self._reviewed_max_mean = 0.0
        self._calls_since = 0
        self._soonest = SOONEST

    def choose(self, counts_RE: IntArray, homes: Homes, trial: Trial | None = None) -> Choice:
        """counts_RE: int64 (R, E), rows that rank r routes to expert e. trial: without one, prices have to do."""
        self._calls_since += 1
        max_mean = max_over_mean(load_of(counts_RE, homes).rank_rows_R)
        if self._kept is not None and not self._due(max_mean):
            planner, exchange = self._kept
            return Choice(self.planners[planner].plan(counts_RE, homes), exchange, planner)
        before = self._kept
        choice = self._review(counts_RE, homes, max_mean, trial)
        if self._kept != before:
            self._soonest = SOONEST
        elif self._calls_since < self.review_every:
            self._soonest = min(2 * self._soonest, self.review_every)
        self._calls_since, self._reviewed_max_mean = 0, max_mean
        return choice

    def state(self) -> dict[str, Any]:
        """All that its next choices depend on beside the counts and the prices, as JSON holds it."""
        kept = None if self._kept is None else [self._kept[0], *self._kept[1]]
        return {
            "kept": kept,
            "reviewed_max_mean": self._reviewed_max_mean,
            "calls_since": self._calls_since,
            "soonest": self._soonest,
            "tried": self.experience.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one's `state` was taken. One that keeps what is not offered here is forgotten."""
        self.experience.restore(state.get("tried", ()))
        if state["kept"] is None:
            return
        planner, transport, chunks = state["kept"]
        exchange = Exchange(str(transport), int(chunks))
        if planner in self.planners and exchange in self.exchanges:
            self._kept = (str(planner), exchange)
            self._reviewed_max_mean, self._calls_since = state["reviewed_max_mean"], state["calls_since"]
            self._soonest = state["soonest"]

    def slots_needed(self, homes: Homes) -> int:
        """The most guest slots a rank can need under any of the planners."""
        return max(planner.slots_needed(homes) for planner in self.planners.values())

    def _due(self, max_mean: float) -> bool:
        if self._calls_since >= self.review_every:
            return True
        moved = abs(max_mean - self._reviewed_max_mean) > DRIFT * self._reviewed_max_mean
        return moved and self._calls_since >= self._soonest

    def _review(self, counts_RE: IntArray, homes: Homes, max_mean: float, trial: Trial | None) -> Choice:
        plans = {name: planner.plan(counts_RE, homes) for name, planner in self.planners.items()}
        self._price(self._worth_pricing(plans), max_mean)
        for _ in range(TRIALS if trial is not None and len(self.review) > 1 else 0):
            if self.experience.knows(max_mean, self._cheapest().pair):
                break
            assert trial is not None
            self._try(plans, max_mean, trial)
        best = self._best()
        self._kept = best.pair
        return Choice(plans[best.planner], best.exchange, best.planner)

    def _best(self) -> Candidate:
        """The kept pair while none is cheaper by more than `hysteresis`; else, of those that tie with the cheapest, the
        one that lends the fewest guests by the simplest exchange."""
        kept = next((c for c in self.review if c.pair == self._kept), None)
        if kept is not None and kept in self._within(self.hysteresis):
            return kept
        return min(
            self._within(TIE), key=lambda c: (c.guests, c.exchange.chunks, self.exchanges.index(c.exchange))
        )

    def _within(self, part: float) -> list[Candidate]:
        """Candidates that the cheapest is not more than this part cheaper than."""
        limit = self._cheapest().expected_ms
        return [c for c in self.review if c.expected_ms * (1.0 - part) <= limit]

    def _cheapest(self) -> Candidate:
        return min(self.review, key=lambda candidate: candidate.expected_ms)

    def _price(self, plans: Mapping[str, Plan], max_mean: float) -> None:
        found: list[Candidate] = []
        for name, plan in plans.items():
            for exchange in self.exchanges:
                ms = self.prices.call_ms(plan, exchange, name)
                expected_ms = self._expected_ms(ms, max_mean, (name, exchange))
                found.append(Candidate(name, exchange, plan.guests, ms, expected_ms))
        self.review = tuple(found)

    def _expected_ms(self, predicted_ms: float, max_mean: float, pair: Pair) -> float:
        """Chunks hide less than prices err by, on CPUs at least (docs/log.md): they have to be tried, or be cheaper for
        certain."""
        ms = predicted_ms * self.experience.correction(max_mean, pair)
        doubted = pair[1].chunks > 1 and not self.experience.knows(max_mean, pair)
        return ms * (1.0 + PRICE_ERROR) if doubted else ms

    def _try(self, plans: Mapping[str, Plan], max_mean: float, trial: Trial) -> None:
        """Let the contenders run, and correct all prices by what they took. Of those that ran before, one is enough."""
        priced = {candidate.pair: candidate for candidate in self.review}
        pairs = contenders({pair: c.expected_ms for pair, c in priced.items()}, WITHIN, TRIED)
        known = [pair for pair in pairs if self.experience.knows(max_mean, pair)]
        pairs = [pair for pair in pairs if pair not in known[1:]]
        choices = [Choice(plans[planner], exchange, planner) for planner, exchange in pairs]
        runs_ms = dict(zip(pairs, run_off(choices, trial), strict=True))
        self.experience.learn(max_mean, {pair: priced[pair].predicted_ms for pair in pairs}, runs_ms)
        self.review = tuple(
            c._replace(expected_ms=self._expected_ms(c.predicted_ms, max_mean, c.pair)) for c in self.review
        )

    def _worth_pricing(self, plans: dict[str, Plan]) -> dict[str, Plan]:
        """The plans without repetitions: one without guests is the identity, priced as its first planner's.

        The kept planner's plan stays whatever it is, so that the kept pair is compared by its own price.
        """
        kept = self._kept[0] if self._kept is not None else None
        idle = [name for name, plan in plans.items() if not plan.guests]
        return {name: plan for name, plan in plans.items() if plan.guests or name in (idle[0], kept)}


def candidate_planners(prices: Prices | None, nodes: Nodes, epsilon: float, slots: int) -> dict[str, Planner]:
    """The planners worth pricing on these nodes, by their names: the simplest first.

    `bounded` hosts a guest for no fewer rows than pay for its weights on the links it takes: on several nodes that
    makes it two planners, one with guests within nodes and one with guests anywhere; likewise `exact`, which takes
    guests at any price. prices: None before anything was measured, for the same planners with guests of any size,
    whose planning is to be timed. epsilon, slots: as of `BoundedPlanner`, which raises ConfigError for a bad one.
    """

    def bounded(*, across_nodes: bool) -> BoundedPlanner:
        return BoundedPlanner(epsilon, slots, prices.guest_rows(across_nodes=across_nodes) if prices else 0)

    found: list[Planner] = [StaticPlanner()]
    if 1 < nodes.count < nodes.ranks:
        found += [WithinNode(bounded(across_nodes=False), nodes), WithinNode(ExactPlanner(), nodes)]
    found += [bounded(across_nodes=nodes.count > 1), ExactPlanner()]
    return {planner.name: planner for planner in found}
