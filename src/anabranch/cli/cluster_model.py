"""The model of the cluster benchmark: whole training micro-batches with forced routing, on this rank.

Shape suffixes: S tokens of this rank, K experts a token, D hidden size, E experts.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from anabranch.integrations.transformers import NAME, AdaptiveEP, adaptive_layers
from anabranch.telemetry.energy import open_meter
from anabranch.telemetry.record import EnergySource


class Timed(NamedTuple):
    """One micro-batch: wall time to the last rank's end; CPU seconds and joules of each rank."""

    step_ms: float
    cpu_s_R: list[float]
    joules: float
    energy_source: EnergySource


class StepModel:
    """A Qwen3-MoE with transformers' own sharding, whose routers choose what they are told.

    A step is one micro-batch of gradient accumulation, forward and backward of the whole model. Gradients of dense
    parameters are synchronised once an optimizer step, alike under every policy: not here. Router weights are those
    of the forced experts, so gradients reach the router. Input ids are arbitrary: routing does not follow them.
    """

    def __init__(self, folder: str, ranks: int, implementation: str) -> None:
        sharding = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=implementation)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=sharding
        )
        self.model.train()
        self.ids: list[Tensor] = []
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(False)
                module.set_reshard_after_forward(False)
                module.set_reshard_after_backward(False)
        gates = [m for m in self.model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
        for number, gate in enumerate(gates):
            gate.forward = partial(self._route, gate, number)
        self.layers = len(gates)

    def _route(self, gate: Any, number: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_SE = nnf.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        ids_SK = self.ids[number]
        weights_SK = logits_SE.gather(1, ids_SK).softmax(dim=-1, dtype=torch.float).to(logits_SE.dtype)
        return logits_SE, weights_SK, ids_SK

    def step(self, ids: list[Tensor]) -> Timed:
        """Forward and backward with these experts for each layer, timed from a common start."""
        self.ids = ids
        tokens = torch.arange(ids[0].shape[0]).unsqueeze(0) * 7919 % self.model.config.vocab_size
        meter = open_meter()
        dist.barrier()
        cpu_s, started_s = time.process_time(), time.perf_counter()
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        took = torch.tensor([1e3 * (time.perf_counter() - started_s)], dtype=torch.float64)
        cpu_s = time.process_time() - cpu_s
        dist.all_reduce(took, dist.ReduceOp.MAX)
        told = torch.tensor([cpu_s, meter.joules()], dtype=torch.float64)
        of_ranks = [torch.empty_like(told) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, told)
        joules = [float(t[1]) for t in of_ranks]
        # All ranks are on this machine: where the meter counts all of it, one rank's figure is all.
        total = max(joules) if meter.whole_machine else sum(joules)
        return Timed(float(took), [float(t[0]) for t in of_ranks], total, meter.source)


class AdaptiveModel(StepModel):
    """The same with our layer, whose experts' carrier can be exchanged between steps."""

    def __init__(self, folder: str, ranks: int) -> None:
        super().__init__(folder, ranks, NAME)
        self.adaptive: list[AdaptiveEP] = list(adaptive_layers(self.model).values())

    def carry(self, layers: list[Any]) -> None:
        """From now on these compute the experts of each layer: called as `AdaptiveExperts`."""
        for adaptive, layer in zip(self.adaptive, layers, strict=True):
            adaptive.layer = layer

    def without_experts(self, ids: list[Tensor]) -> Timed:
        """A step in which experts return what they get: the rest of the model's time."""
        before = [adaptive.layer for adaptive in self.adaptive]
        self.carry([_Echo()] * self.layers)
        try:
            return self.step(ids)
        finally:
            self.carry(before)


class _Echo(nn.Module):
    def forward(self, home: list[Tensor], x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor) -> Tensor:
        # Every parameter has a gradient, as under any policy: the sharding waits for it.
        return x_SD * weights_SK.sum(dim=1, keepdim=True) + 0.0 * sum(p.reshape(-1)[0] for p in home)
