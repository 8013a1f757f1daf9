"""An answer as one HTML file that needs nothing else: no network, no script. It follows the reader's light or dark."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from anabranch.errors import ConfigError
from anabranch.planner import svg, tables
from anabranch.planner.answer import Answer
from anabranch.planner.pareto import amounts
from anabranch.planner.search import GIB
from anabranch.units import amount, digits, dollars, duration

DAY_H = 24.0
STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #fff; --faint: #d5dbe1; --one: #2f6db3; --two: #c4622d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ed; --paper: #14191f; --faint: #39424c; --one: #6aa7e8; --two: #ee9a66; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0;
         border-bottom: 1px solid var(--faint); }
svg { width: 100%; max-width: 44rem; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg text.small { font-size: 11px; } .one { fill: var(--one); } .two { fill: var(--two); }
.open { fill: var(--paper); stroke: var(--two); stroke-width: 2; } .axis { stroke: var(--ink); }
.grid { stroke: var(--faint); } .band { fill: var(--one); opacity: 0.18; } .line { fill: none; stroke-width: 2; }
.line.one { stroke: var(--one); } .line.two { stroke: var(--two); stroke-dasharray: 6 4; }
"""


def write_report(found: Answer, file: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        file.write_text(report(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}", setting="html") from error


def report(found: Answer) -> str:
    """The page."""
    request = found.found.request
    title = f"{found.model} on {request.cluster}, {amount(request.tokens)} tokens"
    sections = [
        ("The answer", _table(tables.result(found))),
        ("A step, by part", _bars(list(found.parts_s.items()), duration, "seconds of a step by part")),
        ("Memory of the fullest chip", _memory(found)),
        ("Time, dollars and energy over clusters", _front(found)),
        ("What moves the result", _swings(found)),
        ("Break-even", _break_even(found)),
        ("The next best layouts", _table(tables.runners_up(found, 12))),
        ("What was not measured", _list(found.unmeasured)),
        ("Every assumption", _table(tables.assumptions(found))),
    ]
    body = "".join(f"<section><h2>{escape(name)}</h2>{text}</section>" for name, text in sections if text)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _bars(rows: list[tuple[str, float]], words: svg.Words, name: str, sums: int = 0) -> str:
    """From 0. sums: how many of the last rows are no part of the others."""
    kinds = ["one"] * (len(rows) - sums) + ["two"] * sums
    bars = [svg.Span(label, 0.0, value, "", words(value), kind=kind)
            for (label, value), kind in zip(rows, kinds, strict=True)]  # fmt: skip
    return svg.spans(bars, name)


def _memory(found: Answer) -> str:
    best, room = found.found.best, found.found.request.room_bytes
    rows = {
        **{name: size for name, size in best.memory.items() if size},
        "all": best.memory_bytes,
        "room": room,
    }
    gib = [(name, size / GIB) for name, size in rows.items()]
    return _bars(gib, lambda size: f"{digits(size)} GiB", "GiB on the fullest chip by part", sums=2)


def _front(found: Answer) -> str:
    priced = all(one.within90.usd for one in found.front.outcomes)
    dots = list[svg.Dot]()
    for number, (one, best) in enumerate(zip(found.front.outcomes, found.front.best, strict=True), 1):
        hours, usd, kwh = amounts(one)
        dots.append(svg.Dot(hours / DAY_H, usd if priced else kwh, str(number), best))
    name_y, words = ("dollars", dollars) if priced else ("kWh", amount)
    most_x, most_y = 1.15 * max(dot.x for dot in dots), 1.15 * max(dot.y for dot in dots)
    axes = svg.Axes(most_x, most_y, "days of training", name_y, digits, words)
    return svg.chart(axes, dots, f"clusters by days and {name_y}") + _table(tables.clusters(found))


def _swings(found: Answer) -> str:
    cost = found.outcome.within90
    middle, words = (cost.usd.mid, dollars) if cost.usd else (cost.hours.mid, tables.hours)
    rows = [svg.Span(one.name, one.low, one.high, words(one.low), words(one.high),
                     f"{one.low_means} .. {one.high_means}") for one in found.swings]  # fmt: skip
    told = (
        "<p>One at a time, all others in the middle. MFU: the ends of the 90 % interval of the step. Price: all that "
        "were seen, a fifth to both sides where that is one. Skew: none, and twice as far from 1; no row where no rank "
        "waits for another's experts.</p>"
    )
    return told + svg.spans(rows, "sensitivity", (middle, words(middle)))


def _break_even(found: Answer) -> str:
    """Nothing where no two clusters were compared."""
    if (made := found.comparison) is None:
        return ""
    curve, left, right = made.mfu_curve(), made.left, made.right
    lines = [
        svg.Line([(at.right, at.even.mid) for at in curve], "costs the same", "one"),
        svg.Line([(at.right, at.goal.mid) for at in curve], f"saves {made.conditions.goal:.0%}", "two"),
    ]
    axes = svg.Axes(1.0, 1.0, f"MFU of {right.name}", f"MFU of {left.name}", _percent, _percent)
    band = [*((at.right, at.even.high) for at in curve), *((at.right, at.even.low) for at in reversed(curve))]
    drawn = svg.chart(
        axes, [svg.Dot(right.mfu, left.mfu, "predicted")], "break-even of two MFUs", lines, band
    )
    return drawn + _list(tables.comparison(found))


def _table(table: tables.Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    title = f"<p>{escape(table.title)}</p>"
    return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _percent(share: float) -> str:
    return f"{share:.0%}"
