"""Which experts deserve memory where not all fit: the forecast of their load.

Shape suffix: N experts of all layers.
"""

import math

import numpy as np
from numpy.typing import NDArray


class Popularity:
    """The probability that the next step needs an expert: the share of past steps that did, old ones forgotten.

    Memory keeps those of the highest; whoever needs room drops the lowest first. half_life: steps after which a step
    counts half. A step counts once, however many rows it sends to an expert: one row is enough to need it here.
    """

    def __init__(self, experts: int, half_life: float) -> None:
        self._fade = 1.0 - math.pow(0.5, 1.0 / half_life)
        # Changed in place: the native store reads it where it is.
        self.wanted_N = np.zeros(experts, dtype=np.float32)

    def observe(self, needed_N: NDArray[np.uint8]) -> None:
        """Take in one step: which experts it needed (1) and which not (0)."""
        self.wanted_N += np.float32(self._fade) * (needed_N - self.wanted_N)
