"""A plan on a terminal."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from anabranch.costs.bounds import Bounds
from anabranch.planner.answer import RUNNERS_UP, Answer
from anabranch.planner.compare import Comparison
from anabranch.planner.pareto import amounts
from anabranch.planner.search import GIB, brief
from anabranch.units import HOUR_S, amount, duration


def show(found: Answer, explain: bool, console: Console | None = None) -> None:
    """explain: with every assumption and its source."""
    console = console or Console()
    console.print(_answer(found))
    console.print(_runners_up(found))
    if len(found.front.outcomes) + len(found.front.refused) > 1:
        console.print(_front(found))
    for line in [*(_comparison(found.comparison) if found.comparison else []), *found.unmeasured]:
        console.print(f"- {line}", highlight=False, soft_wrap=True, markup=False)
    if explain:
        console.print(_assumptions(found))


def _answer(found: Answer) -> Table:
    request, best, result = found.found.request, found.found.best, found.outcome
    cluster = request.cluster
    table = _table(
        f"{found.model} on {cluster} ({cluster.chips} {cluster.chip.kind}), {amount(request.tokens)} tokens: the "
        f"fastest of {found.found.considered:,} layouts, of which {found.found.fitting:,} fit",
        "", "predicted", "80 of 100 within", "90 of 100 within",
    )  # fmt: skip
    low, high = result.within80, result.within90
    table.add_row("layout", brief(best.layout), "", "")
    table.add_row("step", duration(best.step.step_s), *(
        _range(*ends, duration) for ends in (best.step.within80, best.step.within90)
    ))  # fmt: skip
    hours = [_range(one.hours.low * HOUR_S, one.hours.high * HOUR_S, duration) for one in (low, high)]
    table.add_row("training", f"{duration(high.hours.mid * HOUR_S)}, {request.steps:,} steps", *hours)
    table.add_row("model FLOPs over peak", f"{result.mfu:.1%}", "", "")
    if low.usd and high.usd:
        table.add_row(
            f"dollars, {high.owned.basis}",
            _usd(high.usd.mid),
            *(_ends(one, _usd) for one in (low.usd, high.usd)),
        )
    else:
        table.add_row("dollars", "no price is known", "", "")
    table.add_row("kWh at the meter", amount(high.kwh.mid), *(_ends(one.kwh, amount) for one in (low, high)))
    room = f"{best.memory_bytes / GIB:.1f} GiB of {request.room_bytes / GIB:.1f}"
    table.add_row("memory of the fullest chip", room, "", "")
    return table


def _runners_up(found: Answer) -> Table:
    table = _table("the next best layouts", "layout", "step", "90 of 100 within", "GiB")
    for other in found.found.candidates[1 : 1 + RUNNERS_UP]:
        within = _range(*other.step.within90, duration)
        table.add_row(
            brief(other.layout), duration(other.step.step_s), within, f"{other.memory_bytes / GIB:.1f}"
        )
    return table


def _front(found: Answer) -> Table:
    table = _table(
        "other clusters; * none is faster, cheaper and thriftier",
        "",
        "cluster",
        "training",
        "dollars",
        "kWh",
        "layout",
    )
    for one, best in zip(found.front.outcomes, found.front.best, strict=True):
        hours, usd, kwh = amounts(one)
        paid = _usd(usd) if one.within90.usd else "-"
        table.add_row(
            "*" if best else "", str(one.request.cluster), duration(hours * HOUR_S), paid, amount(kwh),
            brief(one.candidate.layout),
        )  # fmt: skip
    for cluster, reason in found.front.refused.items():
        table.add_row("", cluster, "-", "-", "-", reason.removeprefix("cluster: "))
    return table


def _comparison(made: Comparison) -> list[str]:
    return [made.verdict, *made.conditions_told, *made.caveats]


def _assumptions(found: Answer) -> Table:
    table = _table("assumptions", "what", "value", "source", "confidence", "date")
    for one in found.assumptions:
        table.add_row(*one)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _ends(bounds: Bounds[float], text: Callable[[float], str]) -> str:
    return _range(bounds.low, bounds.high, text)


def _range(low: float, high: float, text: Callable[[float], str]) -> str:
    return f"{text(low)} .. {text(high)}"


def _usd(value: float) -> str:
    return f"${amount(value)}"
