"""The setting of one routed micro-batch, and the load that its rows put on the ranks.

Shape suffixes: R ranks of the expert-parallel group, E experts, K experts a token.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import ConfigError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """Who routes what in one micro-batch: `tokens` tokens a rank on average, `top_k` distinct experts each.

    Homes are contiguous: expert e lives on rank e // slots. Raises ConfigError for impossible sizes.
    """

    ranks: int
    experts: int
    tokens: int
    top_k: int
    seed: int
    step: int

    def __post_init__(self) -> None:
        for setting in ("ranks", "experts", "tokens", "top_k"):
            if getattr(self, setting) < 1:
                raise ConfigError(f"{getattr(self, setting)} given, must be at least 1", setting=setting)
        for setting in ("seed", "step"):
            if getattr(self, setting) < 0:
                raise ConfigError(f"{getattr(self, setting)} given, must not be negative", setting=setting)
        if self.top_k > self.experts:
            raise ConfigError(
                f"a token cannot pick {self.top_k} of {self.experts} experts: lower it or raise experts",
                setting="top_k",
            )

    @property
    def slots(self) -> int:
        """Home slots a rank."""
        return -(-self.experts // self.ranks)

    @property
    def full_ranks(self) -> int:
        """Ranks whose every slot holds an expert; always at least rank 0."""
        return self.experts // self.slots

    @property
    def home_E(self) -> IntArray:
        return np.arange(self.experts, dtype=np.int64) // self.slots

    def homes_of(self, rank: int) -> IntArray:
        """Ids of the experts that live on `rank`."""
        return np.arange(rank * self.slots, min((rank + 1) * self.slots, self.experts), dtype=np.int64)

    def fixed(self, stream: int) -> np.random.Generator:
        """Randomness that is the same at every step: which experts are hot."""
        return np.random.default_rng((self.seed, stream))

    def fresh(self, stream: int) -> np.random.Generator:
        """Randomness of this step alone: which tokens a micro-batch happens to hold."""
        return np.random.default_rng((self.seed, stream, self.step))


def contiguous_max_mean(load_E: IntArray | FloatArray, ranks: int) -> float:
    """Rank max/mean of a load per expert under contiguous homes; 1.0 for no load at all."""
    experts = int(load_E.shape[0])
    home_E = np.arange(experts, dtype=np.int64) // -(-experts // ranks)
    load_R = np.bincount(home_E, weights=load_E.astype(np.float64), minlength=ranks)
    total = float(load_R.sum())
    return float(load_R.max()) * ranks / total if total else 1.0
