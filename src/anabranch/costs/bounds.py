"""A quantity with the least and the most that it is likely to be."""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from anabranch.hardware.figure import Figure

Column = NDArray[np.float64]
Amount = TypeVar("Amount", float, Column)


class Bounds(NamedTuple, Generic[Amount]):
    """low <= mid <= high, of one thing or of many in a column."""

    low: Amount
    mid: Amount
    high: Amount

    def plus(self, other: "Bounds[Amount]") -> "Bounds[Amount]":
        return Bounds(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def times(self, other: "Bounds[Amount]") -> "Bounds[Amount]":
        """Of two that are not negative: low with low, high with high, so outer bounds."""
        return Bounds(self.low * other.low, self.mid * other.mid, self.high * other.high)

    def scaled(self, factor: float) -> "Bounds[Amount]":
        """factor: at least 0."""
        return Bounds(self.low * factor, self.mid * factor, self.high * factor)


def exactly(value: float) -> Bounds[float]:
    return Bounds(value, value, value)


def bounds_of(figure: Figure) -> Bounds[float]:
    return Bounds(figure.low, figure.mid, figure.high)
