"""What failures leave of a long run: the share of time that advances it, with checkpoints and restarts.

Failures come at random, memoryless, on any of a run's units (nodes or chips), and each stops the whole run. It restarts
from the last checkpoint; a failure during a checkpoint loses the work before it, one during a restart starts it anew.
Young 1974 (doi:10.1145/361147.361115) and Daly 2006 (doi:10.1016/j.future.2004.11.016).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from anabranch.placement.checks import require_count, require_number

# Llama 3 (arXiv:2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100, eight a node.
NODE_MTBF_H = 54 * 24 * 16_384 / 8 / 419


@dataclass(frozen=True)
class Failures:
    """mtbf_h: mean hours between failures of one unit. units: of the run. checkpoint_s: that training stands still for
    a checkpoint. restart_s: from a failure until training goes on, its detection and the loading included.

    Raises ConfigError naming the field that is out of range.
    """

    mtbf_h: float
    units: int
    checkpoint_s: float
    restart_s: float

    def __post_init__(self) -> None:
        require_number("mtbf_h", self.mtbf_h, 1e-6)
        require_count("units", self.units, 1)
        require_number("checkpoint_s", self.checkpoint_s, 0.0)
        require_number("restart_s", self.restart_s, 0.0)

    @property
    def mtbf_s(self) -> float:
        """Of the whole run: any unit stops it."""
        return self.mtbf_h * 3600.0 / self.units

    @property
    def interval_s(self) -> float:
        """Training between two checkpoints that loses least: Daly's higher-order estimate (his equation 37).

        sqrt(2 C M) of Young is its first term. At least a millisecond, where checkpoints are free.
        """
        cost, mean = self.checkpoint_s, self.mtbf_s
        if cost >= 2.0 * mean:
            return mean
        part = cost / (2.0 * mean)
        best = math.sqrt(2.0 * cost * mean) * (1.0 + math.sqrt(part) / 3.0 + part / 9.0) - cost
        return max(1e-3, best)

    def goodput(self, interval_s: float | None = None) -> float:
        """Of all time the share that advances the run, in the long run; 0..1. interval_s: the best one where None.

        Daly's equation 20: a segment of t seconds takes M e^(R/M) (e^((t+C)/M) - 1) in the mean.
        """
        interval_s = self._checked(interval_s)
        mean = self.mtbf_s
        exponent = (interval_s + self.checkpoint_s) / mean
        if exponent + self.restart_s / mean > 700.0:  # beyond any float: it never ends
            return 0.0
        return interval_s / (mean * math.exp(self.restart_s / mean) * math.expm1(exponent))

    def _checked(self, interval_s: float | None) -> float:
        if interval_s is None:
            return self.interval_s
        require_number("interval_s", interval_s, 1e-6)
        return interval_s

    def replay(self, useful_s: float, interval_s: float | None = None, seed: int = 0) -> "History":
        """One random history of a run of `useful_s` seconds of training."""
        interval_s = self._checked(interval_s)
        rng = np.random.default_rng(seed)
        wall_s, done_s, failures = 0.0, 0.0, 0
        fails_s = float(rng.exponential(self.mtbf_s))
        restarting = False
        while done_s < useful_s:
            step_s = min(interval_s, useful_s - done_s)
            needs_s = self.restart_s if restarting else step_s + self.checkpoint_s
            if wall_s + needs_s > fails_s:
                wall_s, failures, restarting = fails_s, failures + 1, True
                fails_s += float(rng.exponential(self.mtbf_s))
                continue
            wall_s += needs_s
            done_s += 0.0 if restarting else step_s
            restarting = False
        return History(useful_s, wall_s, failures)


class History(NamedTuple):
    """Of one run."""

    useful_s: float
    wall_s: float
    failures: int

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s
