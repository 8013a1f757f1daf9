"""The time of the experts' computation on ranks with uneven rows.

Shape suffixes: R ranks.
"""

from collections.abc import Mapping

import numpy as np

from anabranch.costs.curve import Curve
from anabranch.costs.traffic import FloatArray


class Computation:
    """From measured rows on all ranks at once, and on one alone.

    Ranks of one machine share what bounds them: caches, memory, power. One that still computes when the others have
    finished is faster than all were together, by `alone`: its time alone over that of all at once, 1 without a sample.
    With k of R ranks at work the pace lies between, in proportion to the k - 1 others.
    """

    def __init__(self, all_ms: Mapping[int, float], alone_ms: Mapping[int, float]) -> None:
        self._curve = Curve(all_ms)
        self.rate_ms = self._curve.rate_ms
        """ms a row, over all measured sizes."""
        self.alone = 1.0
        if alone_ms:
            rows = max(alone_ms)
            # Noise may leave the range of what sharing does.
            self.alone = float(np.clip(alone_ms[rows] / max(float(self._curve.ms(rows)), 1e-9), 0.5, 1.0))

    def ms(self, rows_R: FloatArray) -> float:
        """Until the last rank is done with its rows."""
        most = float(rows_R.max())
        whole_ms = float(self._curve.ms(most))
        if self.alone == 1.0 or most == 0.0 or rows_R.size == 1:
            return whole_ms
        # Between two ranks' ends as many are at work as have more rows than that.
        stretches = np.diff(np.sort(rows_R), prepend=0.0) / most
        others = np.arange(rows_R.size - 1, -1, -1) / (rows_R.size - 1)
        return whole_ms * float((stretches * (self.alone + (1.0 - self.alone) * others)).sum())
