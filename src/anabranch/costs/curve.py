"""Time over size, from measured points."""

from collections.abc import Mapping

import numpy as np

from anabranch.costs.traffic import FloatArray
from anabranch.errors import ConfigError


class Curve:
    """Monotone, piecewise linear: a larger size never takes less time.

    Below the smallest measured size its time stands for latency: even nothing takes that long. Beyond the largest
    the rate of the last two points goes on. A point faster than a smaller one is measurement noise and is lifted.
    Raises ConfigError for fewer than two points.
    """

    def __init__(self, ms_by_size: Mapping[int, float]) -> None:
        if len(ms_by_size) < 2:
            raise ConfigError(
                "needs two sizes or more, to tell latency from rate; measure again", setting="samples"
            )
        self._size = np.array(sorted(ms_by_size), dtype=np.float64)
        self._ms = np.maximum.accumulate([ms_by_size[size] for size in sorted(ms_by_size)])
        rise = (self._ms[-1] - self._ms[-2]) / (self._size[-1] - self._size[-2])
        # Two equal last points say nothing about the rate: then the largest size's own.
        self._beyond = float(rise if rise > 0 else self._ms[-1] / self._size[-1])
        self.rate_ms = float((self._ms[-1] - self._ms[0]) / (self._size[-1] - self._size[0])) or self._beyond
        """ms a unit of size, over all points."""

    def ms(self, size: FloatArray | float) -> FloatArray:
        """Times of sizes of at least 0, of the same shape."""
        beyond = np.maximum(np.subtract(size, self._size[-1]), 0.0)
        return np.interp(size, self._size, self._ms) + self._beyond * beyond
