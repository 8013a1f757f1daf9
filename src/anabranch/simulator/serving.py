"""What reasoning chains cost: prefill by computation, decoding by what each step must read, on a cluster.

A bound by `costs.decode`'s roof: no exchange between chips, no host. `reached` says what part of the roof a stack
comes to (`anabranch bench generate` measures it on a machine). A chain's cache grows with every token; memory limits
how many are under way at once.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from anabranch.costs.decode import GIGA, Bound, DecodeShape, Roof, decode_bound
from anabranch.errors import ConfigError
from anabranch.hardware.instance import Cluster
from anabranch.placement.checks import require_count, require_number
from anabranch.workload.shape import ModelShape

# Equal parts of a chain, each priced at its middle: a step's time is linear in the cache but for two kinks.
PARTS = 64
# Of memory, for weights and caches; the rest holds activations and buffers.
USABLE = 0.9


class Chains(NamedTuple):
    """`number` of them, each with a prompt of its own of `prompt` tokens, and `tokens` new ones."""

    number: int
    prompt: int
    tokens: int


class ChainsCost(NamedTuple):
    """Of all chains on the whole cluster. batch: chains at once on one replica. waves: of them, one after another.

    read_bytes: from memory while decoding, all replicas together. cache_bytes: of one replica, at its fullest.
    by: what bounds the last step, "memory" or "compute".
    """

    batch: int
    waves: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    read_bytes: float
    cache_bytes: float
    by: str

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s


@dataclass(frozen=True)
class Serving:
    """Replicas of a model, each spread over `chips` neighbouring chips of a cluster.

    chips: the fewest whose memory is no more than half taken by weights, where 0. weight_bytes, cache_bytes: of one
    number. reached: of bandwidth and peak, above 0 and at most 1. Raises ConfigError naming what cannot be.
    """

    shape: ModelShape
    cluster: Cluster
    chips: int = 0
    precision: str = "bf16"
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0
    reached: float = 1.0

    def __post_init__(self) -> None:
        require_count("chips", self.chips, 0)
        for name in ("weight_bytes", "cache_bytes", "reached"):
            require_number(name, getattr(self, name), 1e-6)
        if self.reached > 1.0:
            raise ConfigError(f"{self.reached:g} of the roof; at most 1", setting="reached")
        if self.replica > self.cluster.chips or self.weights > self.memory:
            raise ConfigError(
                f"weights of {self.weights / GIGA:.0f} GB do not fit on {min(self.replica, self.cluster.chips)} of "
                f"{self.cluster.chips} chips of {self.cluster.chip.memory_gib}",
                setting="chips",
            )

    @property
    def weights(self) -> float:
        """Bytes."""
        return self.shape.params * self.weight_bytes

    @cached_property
    def replica(self) -> int:
        """Chips of one replica."""
        need = 2.0 * self.weights / (USABLE * self._chip_bytes)
        return self.chips or min(2 ** math.ceil(math.log2(max(1.0, need))), self.cluster.chips)

    @property
    def replicas(self) -> int:
        return self.cluster.chips // self.replica

    @property
    def memory(self) -> float:
        """Usable bytes of a replica."""
        return USABLE * self._chip_bytes * self.replica

    @property
    def _chip_bytes(self) -> float:
        return self.cluster.chip.memory_gib.mid * 2**30

    @cached_property
    def roof(self) -> Roof:
        """Of a replica."""
        chip, share = self.cluster.chip, self.reached * self.replica
        return Roof(chip.memory_gb_per_s.mid * share, chip.peak_tflops(self.precision).mid * 1e3 * share)

    @cached_property
    def _token_bytes(self) -> float:
        return self.shape.kv_bytes_per_token(self.cache_bytes)

    def cost(self, chains: Chains) -> ChainsCost:
        """Raises ConfigError where not one chain fits beside the weights."""
        for name in ("number", "prompt", "tokens"):
            require_count(name, getattr(chains, name), 1)
        longest = self.shape.kv_tokens(chains.prompt + chains.tokens) * self._token_bytes
        most = int((self.memory - self.weights) / longest)
        if most < 1:
            raise ConfigError(
                f"a chain of {chains.prompt + chains.tokens} tokens caches {longest / GIGA:.1f} GB, more than weights "
                f"leave of {self.replica} chips; use more chips a replica, or shorter chains",
                setting="tokens",
            )
        own = math.ceil(chains.number / self.replicas)
        waves = math.ceil(own / most)
        batch = math.ceil(own / waves)
        parts = self._parts(chains, batch)
        # Each of PARTS equal parts of a chain stands for as many steps.
        steps = chains.tokens / PARTS * waves
        decode_s = steps * sum(part.step_ms for part in parts) / 1e3
        return ChainsCost(
            batch=batch,
            waves=waves,
            prefill_s=waves * self.prefill_s(chains.prompt, batch),
            decode_s=decode_s,
            tokens_per_s=chains.number * chains.tokens / decode_s,
            read_bytes=min(self.replicas, chains.number) * steps * sum(part.read_bytes for part in parts),
            cache_bytes=batch * longest,
            by=parts[-1].by,
        )

    def step(self, chains: int, length: float) -> Bound:
        """One token of each of `chains` on a replica, all of which are `length` tokens long."""
        cached = chains * self.shape.kv_tokens(round(length))
        return decode_bound(
            decode_shape(self.shape), self.roof, chains, cached, self.weight_bytes, self._token_bytes
        )

    def prefill_s(self, prompt: int, chains: int) -> float:
        """Of prompts of `chains` together: by computation, or by reading the weights once. The head is for the last
        tokens only."""
        flops = self.shape.forward_flops(prompt)
        compute = chains * ((flops.total - flops.head - flops.mtp) * prompt + flops.head)
        return max(compute / (self.roof.gflops * GIGA), self.weights / (self.roof.read_gbps * GIGA))

    def _parts(self, chains: Chains, batch: int) -> list[Bound]:
        middles = chains.prompt + (np.arange(PARTS) + 0.5) * chains.tokens / PARTS
        return [self.step(batch, float(length)) for length in middles]


def decode_shape(shape: ModelShape) -> DecodeShape:
    """A model's sizes as a decode step meets them. Latent attention scores and sums the latents themselves
    (DeepSeek-V2, arXiv:2405.04434, section 2.1.2)."""
    parts, experts, attention = shape.params_by_part, shape.experts, shape.attention
    if attention.latent:
        wide = attention.heads * (2 * attention.latent.kv_rank + attention.latent.rope_dim) / 2
    else:
        wide = attention.heads * (attention.head_dim + attention.v_dim) / 2
    head = 0 if not shape.tied else parts.embedding
    return DecodeShape(
        dense=parts.total - parts.mtp - parts.experts - parts.positions - parts.embedding + head,
        expert=shape.expert_params,
        expert_layers=shape.moe_layers,
        experts=experts.count if experts else 0,
        top_k=experts.top_k if experts else 0,
        kv_numbers=shape.layers * attention.kv_numbers,
        attention=round(shape.layers * wide),
    )
