"""Rollouts: what the model in training generates, with the log-probabilities and the routing of every token.

Shape suffixes: L layers with experts, T tokens, K experts a token.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from anabranch.errors import ConfigError
from anabranch.integrations.routers import experts_modules
from anabranch.integrations.transformers import AUTO, AdaptiveSettings, adaptive_layers
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.pages import PAGE
from anabranch.scheduling.scheduler import Part
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.invariant import batch_invariant
from anabranch.serving.parallel import ParallelEngine
from anabranch.serving.step.base import Outputs
from anabranch.serving.step.native import NativeStep

Ids = NDArray[np.integer[Any]]  # uint8, or int16 for more than 256 experts


class Rollout(NamedTuple):
    """One sample. logprobs: of each of its new tokens, under the model before any sampling setting;
    None for one that was forced.

    routing_LTK: experts of each token of prompt and answer but the last, which never entered the model: T are the
    inputs of an update that learns to predict the answer.
    """

    request: int
    sample: int
    prompt: tuple[int, ...]
    tokens: list[int]
    logprobs: list[float | None]
    routing_LTK: Ids
    end: End


class Refreshed(NamedTuple):
    """What taking over new weights cost. packed_mib: weights that the native step copied, 0 for the torch step."""

    ms: float
    packed_mib: float


class RolloutEngine:
    """Generates with the weights of a model in training.

    The torch step runs the model's own modules, so nothing is copied. The native step packs a copy of the weights.
    Either way keys and values of the old weights are worthless after an optimizer step: `refresh` drops them and
    packs anew. `generate` does so by itself where a parameter was written in place since (its version counter
    moved); call `refresh` after any other change. Use it as a context, or close it.

    A model spread over ranks generates as `ParallelEngine` does: `generate` is then collective, each rank with
    prompts of its own, which may be none.
    """

    def __init__(self, model: PreTrainedModel, settings: EngineSettings | None = None) -> None:
        self.model, self.settings = model, settings or EngineSettings()
        if not experts_modules(model):
            raise ConfigError("has no experts whose routing could be told", setting="model")
        self.refreshed: Refreshed | None = None
        self._versions: list[int] = []
        self._open()

    def __enter__(self) -> "RolloutEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give pages, threads and packed weights back; the model stays the caller's."""
        self.engine.close()

    def refresh(self) -> Refreshed:
        """Take over the model's weights as they are now. Raises ConfigError while chains run."""
        if not self.engine.scheduler.idle:
            raise ConfigError("chains still run with the old weights", setting="refresh")
        started = time.perf_counter()
        if isinstance(self.engine.step, NativeStep):
            self.engine.close()
            self._open()
        else:
            self.engine.scheduler.prefixes.forget(self.engine.scheduler.pool.pages)
            self._versions = _versions(self.model)
        step = self.engine.step
        packed = step.weight_bytes / 2**20 if isinstance(step, NativeStep) else 0.0
        self.refreshed = Refreshed(1e3 * (time.perf_counter() - started), packed)
        return self.refreshed

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """All samples of all requests, in their order, by the model in evaluation mode; it is then put back.

        Raises ConfigError within `BatchInvariant` where experts on several ranks would not be.
        """
        if batch_invariant():
            for layer in adaptive_layers(self.model).values():
                _check_sums(layer.settings)
        if self._versions != _versions(self.model):
            self.refresh()
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            done = (self.parallel or self.engine).generate(requests)
        finally:
            routings = self._record.take()
            for module in training:
                module.training = True
        return [
            Rollout(c.request, c.sample, requests[c.request].prompt, c.tokens, c.logprobs, routing, c.end)
            for c, routing in zip(done, routings, strict=True)
        ]

    def _open(self) -> None:
        self.engine = Engine(self.model, self.settings)
        self.engine.step.routing = True
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        self.parallel = ParallelEngine(self.engine) if sharded else None
        self._record = _Routing(_expert_count(self.model))
        self.engine.watchers.append(self._record)
        self._versions = _versions(self.model)


class _Routing:
    """The routing of each chain, from the steps that computed it. Of a prompt that is shared, from another chain's."""

    def __init__(self, experts: int) -> None:
        self._dtype = np.uint8 if experts <= 256 else np.int16
        self._by_chain: dict[Chain, Ids] = {}
        # Of full pages of prompts, which the prefix tree may hand to a later chain.
        self._by_page: dict[int, Ids] = {}
        # Of what follows a prompt's full pages, which samples copy from each other.
        self._ends: dict[Request, Ids] = {}

    def __call__(self, parts: Sequence[Part], outputs: Outputs) -> None:
        routed_LTK = outputs.routed_LTK
        assert routed_LTK is not None
        row = 0
        for chain, count, *_ in parts:
            mine = self._by_chain.get(chain)
            if mine is None:
                mine = self._by_chain[chain] = self._begin(chain, routed_LTK)
            mine[:, chain.cached : chain.cached + count] = routed_LTK[:, row : row + count]
            row += count
            prompt = len(chain.request.prompt)
            if chain.cached < prompt <= chain.cached + count:
                for index in range(prompt // PAGE):
                    self._by_page[chain.pages[index]] = mine[:, index * PAGE : (index + 1) * PAGE].copy()
                self._ends[chain.request] = mine[:, (prompt - 1) // PAGE * PAGE : prompt - 1].copy()

    def take(self) -> list[Ids]:
        """Of all chains, in the order of their arrival; forgotten then."""
        self._ends.clear()
        chains = sorted(self._by_chain, key=lambda chain: chain.arrival)
        return [self._by_chain.pop(chain)[:, : len(chain.tokens) - 1] for chain in chains]

    def _begin(self, chain: Chain, routed_LTK: Any) -> Ids:
        layers, _, top_k = routed_LTK.shape
        longest = len(chain.request.prompt) + chain.request.max_new_tokens
        mine = np.zeros((layers, longest, top_k), dtype=self._dtype)
        for index in range(chain.cached // PAGE):
            mine[:, index * PAGE : (index + 1) * PAGE] = self._by_page[chain.pages[index]]
        if chain.cached % PAGE:
            mine[:, chain.cached // PAGE * PAGE : chain.cached] = self._ends[chain.request]
        return mine


def _check_sums(settings: AdaptiveSettings) -> None:
    """Of what its experts answer a token's rank adds up all, or others parts of it first: these have to be the same."""
    if settings.transport != "all_to_all" and (settings.transport == AUTO or settings.planner != "static"):
        raise ConfigError(
            f"{settings.transport} adds a token's answers where its experts are, which {settings.planner!r} changes: "
            "batch-invariant experts want all_to_all, or planner='static' and one transport",
            setting="transport",
        )


def _versions(model: nn.Module) -> list[int]:
    return [parameter._version for parameter in model.parameters()]


def _expert_count(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next(getattr(config, name) for name in names if hasattr(config, name))
