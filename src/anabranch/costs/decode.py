"""The roof of decoding: what a step must read and compute at least, and how fast it then could be.

A step reads every dense weight once, every expert that one of its tokens chose, and the cached keys and values; it
multiplies each token with its own weights. It can take no less than the longer of the two (the roofline of Williams
et al., 2009, doi:10.1145/1498765.1498785).
"""

from dataclasses import dataclass
from typing import NamedTuple

from anabranch.placement.checks import require_number

GIGA = 1e9


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of a model as a decode step meets them.

    dense: parameters that every token is multiplied with, the output matrix included and the embedding not.
    expert: parameters of one expert. expert_layers: layers that have experts. kv_numbers: keys and values that one
    token caches, in all layers. attention: heads x head dimension x layers.
    """

    dense: int
    expert: int
    expert_layers: int
    experts: int
    top_k: int
    kv_numbers: int
    attention: int

    def experts_read(self, tokens: int) -> float:
        """Experts of a layer that some of `tokens` choose, expected where all are equally popular."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** tokens)

    @property
    def active(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.dense + self.top_k * self.expert * self.expert_layers


@dataclass(frozen=True)
class Roof:
    """What this machine can do at most. read_gbps: gigabytes a second from memory. gflops: of a matrix product in the
    precision of the step. Raises ConfigError naming one that is not above 0."""

    read_gbps: float
    gflops: float

    def __post_init__(self) -> None:
        for name in ("read_gbps", "gflops"):
            require_number(name, getattr(self, name), 1e-9)


class Bound(NamedTuple):
    """Of one step. by: "memory" or "compute", whichever takes longer."""

    read_bytes: float
    flops: float
    step_ms: float
    by: str


def decode_bound(
    shape: DecodeShape, roof: Roof, chains: int, cached: float, weight_bytes: float, kv_bytes: float,
    attended: float | None = None,
) -> Bound:  # fmt: skip
    """One token of each of `chains`.

    cached: distinct cached tokens that all of them read together; a prompt that they share counts once.
    weight_bytes: of a parameter. kv_bytes: of a token's keys and values. attended: cached tokens with a shared prompt
    counted for each chain that attends to it; `cached` where none is shared.
    """
    weights = shape.dense + shape.experts_read(chains) * shape.expert * shape.expert_layers
    read_bytes = weights * weight_bytes + cached * kv_bytes
    # Scores and weighted values: two multiply-adds a cached number of the query's heads.
    flops = 2.0 * shape.active * chains + 4.0 * shape.attention * (cached if attended is None else attended)
    read_ms, compute_ms = 1e3 * read_bytes / (roof.read_gbps * GIGA), 1e3 * flops / (roof.gflops * GIGA)
    return Bound(
        read_bytes, flops, max(read_ms, compute_ms), "memory" if read_ms >= compute_ms else "compute"
    )
