"""Time over size, from measured points."""

from collections.abc import Mapping

import numpy as np

from anabranch.costs.traffic import FloatArray


class Curve:
    """Monotone, piecewise linear: a larger size never takes less time.

    Below the smallest measured size its time stands for latency: even nothing takes that long. Beyond the largest
    the rate of the last two points goes on. A point faster than a smaller one is measurement noise and is lifted.
    One point alone, or two equal last ones, say nothing about the rate: then it is the largest size's own.
    """

    def __init__(self, ms_by_size: Mapping[int, float]) -> None:
        self._size = np.array(sorted(ms_by_size), dtype=np.float64)
        self._ms = np.maximum.accumulate([ms_by_size[size] for size in sorted(ms_by_size)])
        own = float(self._ms[-1] / max(self._size[-1], 1.0))
        self._beyond = self._rise(-2) or own
        self.rate_ms = self._rise(0) or own
        """ms a unit of size, over all points."""

    def _rise(self, first: int) -> float:
        """Slope from one point to the last; 0.0 where they are the same."""
        if self._size.size == 1:
            return 0.0
        return float((self._ms[-1] - self._ms[first]) / (self._size[-1] - self._size[first]))

    def ms(self, size: FloatArray | float) -> FloatArray:
        """Times of sizes of at least 0, of the same shape."""
        beyond = np.maximum(np.subtract(size, self._size[-1]), 0.0)
        return np.interp(size, self._size, self._ms) + self._beyond * beyond
