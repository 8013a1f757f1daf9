"""How popular experts are: rows of each, as a user gives them, a trace records them, or the shipped traces tell.

Shape suffixes: N micro-batches (of any layer), E experts, F experts of another model, K experts a token.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import ConfigError
from anabranch.placement.base import IntArray
from anabranch.workload import trace
from anabranch.workload.skew import capped_share

FloatArray = NDArray[np.float64]
# Natural routing of two small models trained on real text, steps 20 to 60 (docs/trace.md).
SHIPPED = ("tiny", "tiny8")


@dataclass(frozen=True, eq=False)
class Histogram:
    """share_NE: of a micro-batch's rows that each expert gets; every row sums to 1. layer_N: the layer, 0 first.

    source: where it is from. A histogram of one model has one micro-batch a layer, a trace as many as it recorded.
    rows_N: so many were counted, and their chance is in the shares already; inf where shares are long-term popularity.
    """

    share_NE: FloatArray
    layer_N: IntArray
    source: str
    rows_N: FloatArray

    @property
    def experts(self) -> int:
        return self.share_NE.shape[1]

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers, ascending."""
        return np.unique(self.layer_N).tolist()

    def of_layer(self, layer: int) -> FloatArray:
        """Shares (N, E) of one layer's micro-batches."""
        return self.share_NE[self.layer_N == layer]

    def resampled(self, experts: int, seed: int = 0) -> "Histogram":
        """The same unevenness over another number of experts; itself where the number is the same.

        Popularity over the mean is read off the quantiles of this one: expert i of F has the value at (i + 1/2) / F.
        Where the hot experts live is not known of the other model: they are dealt out at random, alike in all
        micro-batches of a layer. No expert gets hotter than the hottest here, over the mean.
        """
        if experts == self.experts:
            return self
        at_E, at_F = ((np.arange(n) + 0.5) / n for n in (self.experts, experts))
        share_NF = np.array([np.interp(at_F, at_E, np.sort(share_E)) for share_E in self.share_NE])
        for layer in self.layers:
            order_F = np.random.default_rng((seed, layer)).permutation(experts)
            here_N = self.layer_N == layer
            share_NF[here_N] = share_NF[here_N][:, order_F]
        return Histogram(
            share_NF / share_NF.sum(axis=1, keepdims=True),
            self.layer_N,
            f"{self.source}, resampled from {self.experts} to {experts} experts",
            self.rows_N,
        )

    def drawn_from(self, top_k: int) -> FloatArray:
        """Probabilities (N, E) of one row's expert where a token picks none twice: none is above 1 / K."""
        # capped_share wants K experts with rows; those without any get next to none.
        return capped_share(self.share_NE + 1e-12, top_k) / top_k


def histogram_of(counts_NE: IntArray | FloatArray, layer_N: IntArray, source: str) -> Histogram:
    """Of rows counted; parts of rows are popularity. Raises ConfigError naming `histogram` where a micro-batch has
    none."""
    rows_N = counts_NE.sum(axis=1, dtype=np.float64)
    if not np.isfinite(rows_N).all():
        raise ConfigError(f"{source}: rows must be finite numbers, and their sum too", setting="histogram")
    if not counts_NE.size or not (rows_N > 0).all():
        raise ConfigError(f"{source}: a layer without rows tells no popularity", setting="histogram")
    counted_N = (counts_NE == np.floor(counts_NE)).all(axis=1)
    return Histogram(counts_NE / rows_N[:, None], layer_N, source, np.where(counted_N, rows_N, np.inf))


def trace_histogram(path: Path) -> Histogram:
    """Every record of a trace (`anabranch trace` writes it). Raises TraceError."""
    found = trace.load_trace(path)
    return histogram_of(found.counts_NRE.sum(axis=1), found.layer_N, path.name)


def read_histogram(path: Path) -> Histogram:
    """A trace (.npz), or JSON: rows of each expert, [12, 3, ...], or one such list a layer, [[12, 3, ...], ...].

    Raises ConfigError naming the element that is wrong, or TraceError.
    """
    if path.suffix == ".npz":
        return trace_histogram(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is neither a trace (.npz) nor JSON: {error}", setting="histogram"
        ) from error
    layers = _items(content, "histogram", path)
    if not isinstance(layers[0], list):
        layers = [layers]
    rows = [_counts(layer, f"histogram[{i}]", path) for i, layer in enumerate(layers)]
    for i, layer in enumerate(rows):
        if len(layer) != len(rows[0]):
            raise ConfigError(
                f"{len(layer)} experts, {len(rows[0])} in layer 0 (in {path})", setting=f"histogram[{i}]"
            )
    return histogram_of(np.array(rows), np.arange(len(rows)), path.name)


def _items(content: object, place: str, path: Path) -> list[object]:
    if not isinstance(content, list) or not content:
        raise ConfigError(f"must be a list of rows of each expert (in {path})", setting=place)
    return cast("list[object]", content)


def _counts(layer: object, place: str, path: Path) -> list[float]:
    counts: list[float] = []
    for i, rows in enumerate(_items(layer, place, path)):
        if not isinstance(rows, int | float) or isinstance(rows, bool) or not 0 <= rows < float("inf"):
            raise ConfigError(f"{rows!r} is no number of rows (in {path})", setting=f"{place}[{i}]")
        counts.append(float(rows))
    return counts


@lru_cache(maxsize=8)
def natural_histogram(experts: int) -> Histogram:
    """What is assumed where nothing is known: the shipped traces, resampled. Each of their layers is one layer."""
    parts = [trace_histogram(trace.natural_trace(name)).resampled(experts) for name in SHIPPED]
    first = np.cumsum([0, *(len(part.layers) for part in parts)])
    layer_N = np.concatenate([part.layer_N + start for part, start in zip(parts, first, strict=False)])
    source = " and ".join(part.source for part in parts)
    share_NE = np.concatenate([part.share_NE for part in parts])
    rows_N = np.concatenate([part.rows_N for part in parts])
    return Histogram(share_NE, layer_N, source, rows_N)
