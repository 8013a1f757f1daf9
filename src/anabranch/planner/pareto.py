"""Time against dollars against energy, over numbers of nodes and over clusters."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, takewhile
from typing import NamedTuple

from anabranch.costs.training.calibration import Calibration
from anabranch.errors import PlanError
from anabranch.hardware.instance import Cluster
from anabranch.planner.outcome import Outcome, Terms, outcome
from anabranch.planner.search import Request, search

BEST = 32  # layouts of a cluster that are predicted by the whole calibration


class Front(NamedTuple):
    """outcomes: the fastest layout of each cluster. best: those that no other one beats in hours, dollars and kWh at
    once. refused: clusters without a layout, and why."""

    outcomes: tuple[Outcome, ...]
    best: tuple[bool, ...]
    refused: dict[str, str]


def front(
    known: Sequence[Outcome], requests: Sequence[Request], calibration: Calibration, terms: Terms
) -> Front:
    """One point for each of `known` and each request; they differ in their clusters."""
    found, refused = list(known), dict[str, str]()
    for request in requests:
        try:
            fastest = search(request, calibration, BEST).best
        except PlanError as error:
            refused[str(request.cluster)] = str(error)
        else:
            found.append(outcome(request, fastest, terms, calibration))
    return Front(tuple(found), tuple(undominated([amounts(one) for one in found])), refused)


def amounts(found: Outcome) -> tuple[float, float, float]:
    """Hours, dollars (0 where no price is known) and kWh, as predicted."""
    cost = found.within90
    return cost.hours.mid, cost.usd.mid if cost.usd else 0.0, cost.kwh.mid


def undominated(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether no other row is at most as large everywhere and smaller somewhere."""
    return [not any(_beats(other, row) for other in rows) for row in rows]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def on_fewer_nodes(request: Request) -> list[Request]:
    """The same run on 1, 2, 4, ... nodes, as long as they are fewer than the request's."""
    counts = takewhile(lambda nodes: nodes < request.cluster.nodes, (2**power for power in count()))
    instance = request.cluster.instance
    return [replace(request, cluster=Cluster(instance, nodes)) for nodes in counts]
