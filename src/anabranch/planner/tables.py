"""An answer in words, as tables for a terminal and for a page."""

from typing import NamedTuple

from anabranch.planner.answer import Answer
from anabranch.planner.pareto import amounts
from anabranch.planner.search import GIB, brief
from anabranch.units import HOUR_S, amount, dollars, duration, within


class Table(NamedTuple):
    """One row, one line; all in words."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def result(found: Answer) -> Table:
    """What the fastest layout comes to."""
    request, best, low, high = found.found.request, found.found.best, *found.outcome[2:4]
    cluster, steps = request.cluster, (best.step.within80, best.step.within90)
    rows: list[tuple[str, ...]] = [
        ("layout", brief(best.layout), "", ""),
        ("step", duration(best.step.step_s), *(within(step, duration) for step in steps)),
        ("training", f"{hours(high.hours.mid)}, {request.steps:,} steps",
         *(within(cost.hours, hours) for cost in (low, high))),
        ("kWh at the meter", amount(high.kwh.mid), *(within(cost.kwh, amount) for cost in (low, high))),
        ("model FLOPs over peak", f"{found.outcome.mfu:.1%}", "", ""),
        ("memory of the fullest chip", f"{gib(best.memory_bytes)} of {gib(request.room_bytes)}",
         *(within(cost.memory, gib) if cost.memory else "" for cost in (low, high))),
    ]  # fmt: skip
    paid = ("dollars", "no price is known", "", "")
    if low.usd and high.usd:
        ends = (within(usd, dollars) for usd in (low.usd, high.usd))
        paid = (f"dollars, {high.owned.basis}", dollars(high.usd.mid), *ends)
    title = (
        f"{found.model} on {cluster} ({cluster.chips} {cluster.chip.kind}), {amount(request.tokens)} tokens: the "
        f"fastest of {found.found.considered:,} layouts, of which {found.found.fitting:,} fit"
    )
    return Table(
        title, ("", "predicted", "80 of 100 within", "90 of 100 within"), [*rows[:3], paid, *rows[3:]]
    )


def runners_up(found: Answer, count: int) -> Table:
    """The layouts that come next."""
    rows: list[tuple[str, ...]] = [
        (brief(one.layout), duration(one.step.step_s), within(one.step.within90, duration),
         f"{one.memory_bytes / GIB:.1f}")
        for one in found.found.candidates[1 : 1 + count]
    ]  # fmt: skip
    return Table("the next best layouts", ("layout", "step", "90 of 100 within", "GiB"), rows)


def clusters(found: Answer) -> Table:
    """Every cluster that was tried, and why those without a layout have none."""
    rows = list[tuple[str, ...]]()
    for number, (one, best) in enumerate(zip(found.front.outcomes, found.front.best, strict=True), 1):
        time_h, usd, kwh = amounts(one)
        paid = dollars(usd) if one.within90.usd else "-"
        name = f"{one.request.cluster}{' *' if best else ''}"
        rows.append((str(number), name, hours(time_h), paid, amount(kwh), brief(one.candidate.layout)))
    rows += [("", name, "-", "-", "-", reason) for name, reason in found.front.refused.items()]
    title = "clusters, each by its fastest layout; * no other is faster, cheaper and thriftier at once"
    paid = f"dollars, {found.outcome.within90.owned.basis}"
    return Table(title, ("", "cluster", "training", paid, "kWh", "layout"), rows)


def assumptions(found: Answer) -> Table:
    """Every figure that the answer rests on."""
    names = ("what", "value", "source", "confidence", "date")
    return Table("assumptions", names, [tuple(one) for one in found.assumptions])


def comparison(found: Answer) -> list[str]:
    """What one cluster saves over another, a sentence each; none where they were not compared."""
    made = found.comparison
    return [made.verdict, *made.conditions_told, *made.caveats] if made else []


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


def hours(time_h: float) -> str:
    return duration(time_h * HOUR_S)
