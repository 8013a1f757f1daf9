"""Amounts in words: a length of time, a large number, an interval."""

from collections.abc import Callable
from typing import Protocol

MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0
# What large numbers are counted in, largest first.
THOUSANDS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


def duration(seconds: float) -> str:
    """Three digits in the largest unit of which it has two: 95 s, 31 min, 5.2 h, 84.6 days."""
    for unit_s, name in ((DAY_S, "days"), (HOUR_S, "h"), (MINUTE_S, "min"), (1.0, "s")):
        if seconds >= 2 * unit_s:
            return f"{digits(seconds / unit_s)} {name}"
    return f"{digits(seconds * 1e3)} ms" if seconds < 1.0 else f"{digits(seconds)} s"


def amount(value: float) -> str:
    """Three digits: 950, 12.5 k, 3.46 M."""
    for size, name in THOUSANDS:
        if abs(value) >= size:
            return f"{digits(value / size)}{name}"
    return digits(value)


def digits(value: float) -> str:
    """Three of them, more only before the point, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def dollars(value: float) -> str:
    return f"${amount(value)}"


class Ends(Protocol):
    """Of an interval."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def within(ends: Ends, words: Callable[[float], str]) -> str:
    return f"{words(ends.low)} .. {words(ends.high)}"
