"""The whole answer to a request: the layout, what it comes to, and what that rests on."""

from dataclasses import asdict, replace
from typing import Any, NamedTuple

from anabranch.costs.training.calibration import Calibration
from anabranch.planner.assumptions import Assumption, assumptions, unmeasured
from anabranch.planner.compare import Comparison, Offer, compare
from anabranch.planner.outcome import (
    USUAL_BASES,
    Outcome,
    Swing,
    Terms,
    breakdown,
    outcome,
    sensitivity,
    utilisation,
)
from anabranch.planner.pareto import Front, front, on_fewer_nodes
from anabranch.planner.search import GIB, Found, Request, search
from anabranch.units import HOUR_S, Ends

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
    swings: list[Swing]
    assumptions: list[Assumption]
    unmeasured: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: amounts with the ends of their intervals, seconds, dollars, kWh and GiB."""
        best, request, (low, high) = self.found.best, self.found.request, self.outcome[2:4]
        hours80, hours90 = low.hours.scaled(HOUR_S), high.hours.scaled(HOUR_S)
        return {
            "model": self.model,
            "cluster": str(request.cluster),
            "chips": request.cluster.chips,
            "tokens": request.tokens,
            "steps": request.steps,
            "layout": asdict(best.layout),
            "layouts": {"considered": self.found.considered, "fitting": self.found.fitting},
            "step_s": _interval(*best.step),
            "training_s": _interval(hours90.mid, hours80, hours90),
            "usd": _interval(high.usd.mid, low.usd, high.usd) if low.usd and high.usd else None,
            "basis": high.owned.basis,
            "kwh": _interval(high.kwh.mid, low.kwh, high.kwh),
            "mfu": _short(self.outcome.mfu),
            "skew": _short(best.setup.skew),
            "memory_gib": {
                "predicted": _short(best.memory_bytes / GIB),
                **(_interval(best.memory_bytes, low.memory, high.memory, GIB) if low.memory and high.memory else {}),
                "room": _short(request.room_bytes / GIB),
                "parts": {name: _short(size / GIB) for name, size in best.memory.items()},
            },
            "parts_s": {name: _short(seconds) for name, seconds in self.parts_s.items()},
            "runners_up": [
                {"layout": asdict(other.layout), "step_s": _interval(*other.step),
                 "memory_gib": _short(other.memory_bytes / GIB)}
                for other in self.found.candidates[1 : 1 + RUNNERS_UP]
            ],
            "pareto": [_point(one, best) for one, best in zip(self.front.outcomes, self.front.best, strict=True)],
            "refused": self.front.refused,
            "comparison": self.comparison.to_json() if self.comparison else None,
            "sensitivity": [swing._asdict() for swing in self.swings],
            "assumptions": [one._asdict() for one in self.assumptions],
            "unmeasured": self.unmeasured,
        }  # fmt: skip


def answer(question: Question, calibration: Calibration) -> Answer:
    """Raises PlanError where nothing fits, ConfigError where a price or a power is not known."""
    request, terms = question.request, _one_basis(question)
    found = search(request, calibration)
    result = outcome(request, found.best, terms, calibration)
    points = front([result], [*on_fewer_nodes(request), *question.others], calibration, terms)
    told = assumptions(result, terms, calibration, question.skew_origin, question.given)
    return Answer(
        question.model, found, result, breakdown(found.best, calibration), points,
        _comparison(question, terms, calibration), sensitivity(result, calibration), told,
        unmeasured(result, calibration),
    )  # fmt: skip


def _one_basis(question: Question) -> Terms:
    """With one kind of price for all clusters, where the user asks for none and there is one that all of them have."""
    requests = (question.request, *question.others, *(question.compared or ()))
    prices = [request.cluster.instance.prices for request in requests]
    common = next((basis for basis in USUAL_BASES if all(basis in known for known in prices)), None)
    return replace(question.terms, basis=question.terms.basis or common)


def _comparison(question: Question, terms: Terms, calibration: Calibration) -> Comparison | None:
    """Raises ConfigError where one of the two has no price."""
    if question.compared is None:
        return None
    left, right = (_offer(request, terms, calibration) for request in question.compared)
    return compare(left, right)


def _offer(request: Request, terms: Terms, calibration: Calibration) -> Offer:
    cluster, step = request.cluster, search(request, calibration).best.step
    price = cluster.instance.price(terms.basis_of(cluster) or USUAL_BASES[0])
    mfu, unseen = utilisation(request, step.step_s), not calibration.has_run(cluster.chip.kind)
    return Offer(
        str(cluster), cluster.chips, cluster.nodes, price, step, mfu, unseen, terms.goodput_of(cluster)
    )


def _point(one: Outcome, best: bool) -> dict[str, Any]:
    cost = one.within90
    return {
        "cluster": str(one.request.cluster), "best": best, "layout": asdict(one.candidate.layout),
        "training_s": _short(cost.hours.mid * HOUR_S), "usd": _short(cost.usd.mid) if cost.usd else None,
        "kwh": _short(cost.kwh.mid),
    }  # fmt: skip


def _interval(mid: float, within80: Ends, within90: Ends, unit: float = 1.0) -> dict[str, float]:
    values = {
        "predicted": mid, "low80": within80.low, "high80": within80.high, "low90": within90.low, "high90": within90.high
    }  # fmt: skip
    return {name: _short(value / unit) for name, value in values.items()}


def _short(value: float) -> float:
    """Five digits: what is predicted has fewer."""
    return float(f"{value:.5g}")
