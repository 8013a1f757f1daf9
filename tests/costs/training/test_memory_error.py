"""Published peaks over predicted ones, one a configuration, and the interval they give."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.costs.training.memory_error import memory_ratios, peaks_within, published_peak
from anabranch.costs.training.published import read_published


def test_a_configuration_counts_once():
    row = next(row for row in read_published()[0] if row.memory_gb)
    predicted = published_peak(row)
    rows = [
        replace(row, memory_gb=predicted / 1e9),
        replace(row, memory_gb=4 * predicted / 1e9),
        replace(row, memory_gb=predicted / 1e9, leak_group="another"),
        replace(row, memory_gb=None, leak_group="without"),
    ]
    assert memory_ratios(rows) == pytest.approx([1.0, 2.0])


def test_the_interval_holds_its_share_of_new_ratios():
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        ratios = np.sort(np.exp(0.3 * random.standard_normal(60)))
        low, high = peaks_within(ratios[:], 10.0, 0.8)
        held.append(low <= 10.0 * np.exp(0.3 * random.standard_normal()) <= high)
    assert 0.74 < np.mean(held) < 0.88


def test_few_ratios_give_their_ends_and_none_nothing():
    assert peaks_within(np.array([0.5, 1.0, 3.0]), 2.0, 0.9) == (1.0, 6.0)
    assert peaks_within(np.array([]), 2.0, 0.9) is None
