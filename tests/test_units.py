"""Amounts in words keep three digits and their size."""

import pytest

from anabranch.units import amount, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0123, "12.3 ms"),
        (1.5, "1.5 s"),
        (119, "119 s"),
        (121, "2.02 min"),
        (7201, "2 h"),
        (31.65 * 86400, "31.6 days"),
    ],
)
def test_a_length_of_time(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (950, "950"), (12_345, "12.3 k"), (3.456e6, "3.46 M"), (1e12, "1 T"), (2e15, "2,000 T")],
)
def test_a_large_number(value, words):
    assert amount(value) == words
