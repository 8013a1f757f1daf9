"""Plots as inline SVG: spans (bars, or swings around a middle) and charts of dots, lines and a band.

Colours are classes that the page's style sets. Coordinates are pixels of a picture `WIDTH` wide; the page scales it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import NamedTuple

WIDTH, LEFT, RIGHT, ROW = 640.0, 160.0, 110.0, 26.0
HEIGHT, BOTTOM, TOP = 320.0, 48.0, 20.0
Words = Callable[[float], str]


class Span(NamedTuple):
    """From low to high, with words at both ends and under the label. kind: "one" or "two", its colour."""

    label: str
    low: float
    high: float
    left: str
    right: str
    under: str = ""
    kind: str = "one"


def spans(rows: Sequence[Span], name: str, middle: tuple[float, str] | None = None) -> str:
    """One under the other. middle: a line down all of them, with its words."""
    least, most = min(row.low for row in rows), max(row.high for row in rows)
    start = LEFT + (90.0 if any(row.left for row in rows) else 0.0)
    tall = ROW * (1.6 if any(row.under for row in rows) else 1.0)

    def x(value: float) -> float:
        return start + (WIDTH - RIGHT - start) * (value - least) / (most - least or 1.0)

    parts = list[str]()
    for y, row in zip((TOP + tall * i for i in range(len(rows))), rows, strict=True):
        width = max(0.5, x(row.high) - x(row.low))
        parts += [
            f'<rect x="{x(row.low):.1f}" y="{y:.1f}" width="{width:.1f}" height="{ROW - 8:.1f}" class="{row.kind}"/>',
            _text(LEFT - 8, y + 13, row.label, "end"), _text(x(row.low) - 6, y + 13, row.left, "end"),
            _text(x(row.high) + 6, y + 13, row.right), _text(LEFT - 8, y + 28, row.under, "end", "small"),
        ]  # fmt: skip
    bottom = TOP + tall * len(rows)
    if middle:
        at = x(middle[0])
        parts += [_line(at, TOP - 6, at, bottom), _text(at, bottom + 14, middle[1], "middle")]
    return _picture(parts, bottom + 20, name)


@dataclass(frozen=True)
class Axes:
    """From 0 to the most of each axis."""

    most_x: float
    most_y: float
    name_x: str
    name_y: str
    words_x: Words
    words_y: Words

    def x(self, value: float) -> float:
        return 80.0 + (WIDTH - 80.0 - RIGHT) * value / self.most_x

    def y(self, value: float) -> float:
        """What is above the most lies at the edge."""
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(1.0, value / self.most_y)

    def path(self, rows: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in rows)

    def drawn(self) -> list[str]:
        """Both axes with their ticks and names."""
        left, right, bottom = self.x(0.0), self.x(self.most_x), self.y(0.0)
        parts = [_line(left, bottom, right, bottom), _line(left, bottom, left, TOP)]
        for x, words in ((self.x(at), self.words_x(at)) for at in ticks(self.most_x)):
            parts += [_line(x, bottom, x, bottom + 4), _text(x, bottom + 17, words, "middle", "small")]
        for y, words in ((self.y(at), self.words_y(at)) for at in ticks(self.most_y)):
            parts += [_line(left, y, right, y, "grid"), _text(left - 6, y + 4, words, "end", "small")]
        return [*parts, _text(right, bottom + 36, self.name_x, "end"), _text(left + 6, TOP - 7, self.name_y)]


class Dot(NamedTuple):
    x: float
    y: float
    label: str
    filled: bool = True


class Line(NamedTuple):
    """kind: "one" or "two", its colour."""

    rows: Sequence[tuple[float, float]]
    label: str
    kind: str


def chart(
    axes: Axes, dots: Sequence[Dot], name: str, lines: Sequence[Line] = (), band: Sequence[tuple[float, float]] = ()
) -> str:  # fmt: skip
    """Dots and lines with their labels, lines up to the upper edge; behind them a band, by its outline."""
    parts = [f'<polygon points="{axes.path(band)}" class="band"/>', *axes.drawn()]
    for line in lines:
        inside = [(x, y) for x, y in line.rows if y <= axes.most_y]
        parts.append(f'<polyline points="{axes.path(inside)}" class="line {line.kind}"/>')
        parts += [_text(axes.x(x) + 5, axes.y(y) + 4, line.label, kind="small") for x, y in inside[-1:]]
    for dot in dots:
        x, y = axes.x(dot.x), axes.y(dot.y)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{"two" if dot.filled else "open"}"/>')
        parts.append(_text(x + 9, y + 4, dot.label, kind="small"))
    return _picture(parts, HEIGHT, name)


def ticks(most: float) -> list[float]:
    """Round numbers above 0 up to `most`, three to ten of them."""
    size = 10.0 ** floor(log10(most))
    step = next(size * part for part in (2.0, 1.0, 0.5, 0.2) if most / (size * part) >= 3.0)
    return [step * i for i in range(1, int(most / step + 1e-9) + 1)]


def _picture(parts: Sequence[str], height: float, name: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img"'
    return f'{head} aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "words") -> str:
    if not words:
        return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
