"""Figures: ranges, units, and what is refused."""

import pytest

from anabranch.errors import ConfigError
from anabranch.hardware.figure import UNITS, Figure

GOOD = {"low": 1.0, "high": 2.0, "unit": "TB/s", "source": "a book", "confidence": "official"}


def test_a_figure_keeps_its_range_and_changes_its_unit():
    figure = Figure(**GOOD)
    assert (figure.mid, figure.is_range, str(figure)) == (1.5, True, "1..2 TB/s")
    base = figure.in_base()
    assert (base.low, base.high, base.unit, base.source) == (1000.0, 2000.0, "GB/s", "a book")
    assert str(Figure(**{**GOOD, "high": 1.0}).scaled(8)) == "8 TB/s"


def test_units_stand_for_themselves():
    for base, _ in UNITS.values():
        assert UNITS[base] == (base, 1.0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"low": -1.0}, "low"),
        ({"low": 3.0}, "low"),
        ({"high": float("inf")}, "high"),
        ({"low": float("nan")}, "low"),
        ({"unit": "TB"}, "unit"),
        ({"source": " "}, "source"),
        ({"confidence": "sure"}, "confidence"),
    ],
)
def test_what_is_no_figure_is_refused_by_its_field(wrong, named):
    with pytest.raises(ConfigError) as raised:
        Figure(**{**GOOD, **wrong})
    assert raised.value.setting == named
