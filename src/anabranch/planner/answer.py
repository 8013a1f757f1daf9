"""The whole answer to a request: the layout, what it comes to, and what that rests on."""

import dataclasses
from typing import Any, NamedTuple

from anabranch.costs.bounds import Bounds
from anabranch.costs.training.calibration import Calibration, Prediction
from anabranch.planner.assumptions import Assumption, assumptions, unmeasured
from anabranch.planner.compare import Comparison, Offer, compare
from anabranch.planner.outcome import USUAL_BASES, Outcome, Terms, breakdown, outcome, utilisation
from anabranch.planner.pareto import Front, front, on_fewer_nodes
from anabranch.planner.search import GIB, Found, Request, search
from anabranch.units import HOUR_S

RUNNERS_UP = 4


class Question(NamedTuple):
    """model: its name, as asked for. skew_origin: where the request's skew is from. given: names of settings that the
    user chose. others: the same run on other clusters, for the front. compared: on two, for what one of them saves."""

    model: str
    request: Request
    terms: Terms
    skew_origin: str
    given: frozenset[str] = frozenset()
    others: tuple[Request, ...] = ()
    compared: tuple[Request, Request] | None = None


class Answer(NamedTuple):
    """parts_s: of a step."""

    model: str
    found: Found
    outcome: Outcome
    parts_s: dict[str, float]
    front: Front
    comparison: Comparison | None
    assumptions: list[Assumption]
    unmeasured: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: amounts with the ends of their intervals, seconds, dollars, kWh and GiB."""
        best, result, request = self.found.best, self.outcome, self.found.request
        return {
            "model": self.model,
            "cluster": str(request.cluster),
            "chips": request.cluster.chips,
            "tokens": request.tokens,
            "steps": request.steps,
            "layout": dataclasses.asdict(best.layout),
            "layouts": {"considered": self.found.considered, "fitting": self.found.fitting},
            "step_s": _step(best.step),
            "training_s": _interval(
                *(cost.hours.scaled(HOUR_S) for cost in (result.within80, result.within90))
            ),
            "usd": _interval(result.within80.usd, result.within90.usd),
            "basis": result.within90.owned.basis,
            "kwh": _interval(result.within80.kwh, result.within90.kwh),
            "mfu": _short(result.mfu),
            "skew": _short(best.setup.skew),
            "memory_gib": {
                "peak": _short(best.memory_bytes / GIB),
                "room": _short(request.room_bytes / GIB),
                **{name: _short(size / GIB) for name, size in best.memory.items()},
            },
            "parts_s": {name: _short(seconds) for name, seconds in self.parts_s.items()},
            "runners_up": [
                {"layout": dataclasses.asdict(other.layout), "step_s": _step(other.step),
                 "memory_gib": _short(other.memory_bytes / GIB)}
                for other in self.found.candidates[1 : 1 + RUNNERS_UP]
            ],
            "pareto": [_point(one, best) for one, best in zip(self.front.outcomes, self.front.best, strict=True)],
            "refused": self.front.refused,
            "comparison": self.comparison.to_json() if self.comparison else None,
            "assumptions": [one._asdict() for one in self.assumptions],
            "unmeasured": self.unmeasured,
        }  # fmt: skip


def answer(question: Question, calibration: Calibration) -> Answer:
    """Raises PlanError where nothing fits, ConfigError where a price or a power is not known."""
    request, terms = question.request, question.terms
    found = search(request, calibration)
    result = outcome(request, found.best, terms)
    points = front([result], [*on_fewer_nodes(request), *question.others], calibration, terms)
    told = assumptions(result, terms, calibration, question.skew_origin, question.given)
    return Answer(
        question.model, found, result, breakdown(found.best, calibration), points,
        _comparison(question, calibration), told, unmeasured(result, calibration),
    )  # fmt: skip


def _comparison(question: Question, calibration: Calibration) -> Comparison | None:
    """Raises ConfigError where one of the two has no price."""
    if question.compared is None:
        return None
    left, right = (_offer(request, question, calibration) for request in question.compared)
    return compare(left, right)


def _offer(request: Request, question: Question, calibration: Calibration) -> Offer:
    cluster, step = request.cluster, search(request, calibration).best.step
    basis = question.terms.basis or _common_basis(question) or question.terms.basis_of(cluster)
    return Offer(
        str(cluster), cluster.chips, cluster.nodes, cluster.instance.price(basis or USUAL_BASES[0]), step,
        utilisation(request, step.step_s), not calibration.has_run(cluster.chip.kind),
        question.terms.goodput_of(cluster),
    )  # fmt: skip


def _common_basis(question: Question) -> str | None:
    """The first that both of the compared have a price of."""
    prices = [request.cluster.instance.prices for request in question.compared or ()]
    return next((basis for basis in USUAL_BASES if all(basis in known for known in prices)), None)


def _point(one: Outcome, best: bool) -> dict[str, Any]:
    cost = one.within90
    return {
        "cluster": str(one.request.cluster), "best": best, "layout": dataclasses.asdict(one.candidate.layout),
        "training_s": _short(cost.hours.mid * HOUR_S), "usd": _short(cost.usd.mid) if cost.usd else None,
        "kwh": _short(cost.kwh.mid),
    }  # fmt: skip


def _step(step: Prediction) -> dict[str, float]:
    return {
        "predicted": _short(step.step_s),
        **_ends("80", *step.within80),
        **_ends("90", *step.within90),
    }


def _interval(within80: Bounds[float] | None, within90: Bounds[float] | None) -> dict[str, float] | None:
    if within80 is None or within90 is None:
        return None
    return {
        "predicted": _short(within90.mid),
        **_ends("80", within80.low, within80.high),
        **_ends("90", within90.low, within90.high),
    }


def _ends(level: str, low: float, high: float) -> dict[str, float]:
    return {f"low{level}": _short(low), f"high{level}": _short(high)}


def _short(value: float) -> float:
    """Five digits: what is predicted has fewer."""
    return float(f"{value:.5g}")
