"""The seam to transformers: the one file that touches its expert-parallel interfaces.

`register` puts an `EPImplementation` named "anabranch" into `EPImplementationInterface`; from then on
`DistributedConfig(ep_implementation="anabranch")` selects it for any model whose config has an
expert-parallel plan. `tests/integrations/test_seam.py` names what moved when a release of transformers
changes one of the pieces used here.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.expert_parallel import (
    EpDispatchExpertsParallel,
    EPImplementation,
    EPImplementationInterface,
    MoEParamShard,
)
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from anabranch.errors import ConfigError, RankError
from anabranch.experts.adaptive import AdaptiveExperts, Observation
from anabranch.experts.grouped import experts_forward
from anabranch.experts.guests import tie
from anabranch.integrations.carriers import Carriers
from anabranch.integrations.empty_share import bypass_sharding, load_empty_shares
from anabranch.integrations.measure import LayerShape
from anabranch.integrations.trial import LayerTrial
from anabranch.placement.base import Homes, IntArray
from anabranch.placement.cheapest import CheapestChoice, candidate_planners
from anabranch.placement.checks import require_count
from anabranch.placement.choice import BySize, Chooser, Exchange, FixedChoice
from anabranch.placement.policy import make_planner, require_planner
from anabranch.placement.pricing import Pricing
from anabranch.transport.base import Wires
from anabranch.transport.choose import OVERLAPPING, candidate_exchanges, require_transport
from anabranch.transport.domain import make_domain

NAME = "anabranch"
AUTO = "auto"
LAYER_ATTRIBUTE = "anabranch_layer"
# Rows of all ranks in a call of inference up to which `all_to_all` took the least time: measured over gloo on 2 and 4
# ranks of a CPU (hidden size 512, 4 of 16 experts); on other links not measured.
SMALL_ROWS = 512


@dataclass(frozen=True)
class AdaptiveSettings:
    """How experts are balanced. Checked on construction: raises ConfigError naming the setting.

    planner: "bounded", "exact", "static", "least_loaded", "periodic_replication", or "auto".
    epsilon: load a rank may carry above the mean before `bounded` moves anything, as a fraction.
    slots: guest experts a rank may host at once under `bounded`.
    transport: "all_to_all", "dedup", "two_level", "all_gather", or "auto".
    chunks: pieces of a micro-batch whose exchange and computation overlap; `auto` transports choose their own.
    dispatch_wire, combine_wire: "none", or a lossy codec of rows between ranks.
    """

    planner: str = "bounded"
    epsilon: float = 0.05
    slots: int = 2
    transport: str = "auto"
    chunks: int = 1
    dispatch_wire: str = "none"
    combine_wire: str = "none"

    def __post_init__(self) -> None:
        require_planner(self.planner, AUTO)
        name = "bounded" if self.planner == AUTO else self.planner
        make_planner(name, epsilon=self.epsilon, slots=self.slots)
        require_transport(self.transport, AUTO)
        require_count("chunks", self.chunks, 1)
        if self.chunks > 1 and self.transport not in OVERLAPPING:
            raise ConfigError(
                f"{self.transport} sends a micro-batch in one piece; use {' or '.join(OVERLAPPING)}, or chunks=1",
                setting="chunks",
            )
        if self.planner == AUTO and self.transport == "all_gather":
            raise ConfigError(
                "all_gather has fixed buffers and no price; use another transport", setting="transport"
            )
        if self.wires != Wires() and self.transport == "all_gather":
            raise ConfigError(
                "all_gather sends rows as they are; use another transport", setting="dispatch_wire"
            )

    @property
    def wires(self) -> Wires:
        return Wires(self.dispatch_wire, self.combine_wire)

    def digest(self) -> int:
        """A number equal on two ranks only if their settings are."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:7], "big")


class AdaptiveEP(EPImplementation):
    """The experts of one layer, balanced by `AdaptiveExperts`. One instance per experts module."""

    settings: ClassVar[AdaptiveSettings]
    pricing: ClassVar[Pricing]
    shared: ClassVar[dict[Any, Carriers]]
    """What the layers of one group share: process groups are never given back."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts: Any = experts
        self.names = [
            n for n, p in experts.named_parameters(recurse=False) if isinstance(p, DTensor) and p.ndim > 0
        ]
        if not self.names:
            raise ConfigError(
                f"{type(experts).__name__} has no parameter sharded by expert: its plan needs 'grouped_gemm' rules",
                setting="ep_plan",
            )
        self.group = ep_mesh.get_group()
        self.homes = Homes.contiguous(self.experts._parameters[self.names[0]].shape[0], ep_mesh.size())
        self.forward = experts_forward(experts, self.names, self.experts_forward)
        self.layer: AdaptiveExperts | None = None
        # Of passes in evaluation mode without gradients: they neither use up what training keeps nor are priced by it.
        self.inference: AdaptiveExperts | None = None
        self._foreseen: IntArray | None = None
        self._restored: dict[str, Any] | None = None
        self.observers: list[Callable[[Observation], None]] = []
        _check_agreement(self.settings, self.group, ep_mesh.device_type)
        self.carriers = self._carriers(ep_mesh)
        setattr(experts, LAYER_ATTRIBUTE, self)

    def _carriers(self, ep_mesh: DeviceMesh) -> Carriers:
        if self.group not in self.shared:
            domain = make_domain(self.group, torch.device(ep_mesh.device_type))
            s = self.settings
            exchanges = (
                candidate_exchanges(domain.nodes)
                if s.transport == AUTO
                else (Exchange(s.transport, s.chunks),)
            )
            self.shared[self.group] = Carriers(domain, exchanges, s.wires)
        return self.shared[self.group]

    def adaptive(self, home: list[Tensor], x_SD: Tensor, top_k: int) -> AdaptiveExperts:
        """The layer behind this module; built at the first call, when the shapes it is priced for are known."""
        if not self.experts.training and not torch.is_grad_enabled():
            self.inference = self.inference or self._made(self._inference_chooser())
            return self.inference
        if self.layer is None:
            self.layer = self._made(self._chooser(home, x_SD, top_k))
            self.layer.trial_of = LayerTrial
            if self._restored is not None:
                self.restore(self._restored)
            if self._foreseen is not None:
                self.layer.foresee(self._foreseen)
        return self.layer

    def _made(self, chooser: Chooser) -> AdaptiveExperts:
        made = AdaptiveExperts(self.group, self.homes, chooser, self.carriers.transports, self.forward)
        made.observers = self.observers
        return made

    def foresee(self, counts_MRE: IntArray) -> None:
        """Plan the coming calls in training now, or as soon as the layer is built; see `plan_ahead`."""
        self._foreseen = counts_MRE
        if self.layer is not None:
            self.layer.foresee(counts_MRE)

    def state(self) -> dict[str, Any] | None:
        """What a choice by price keeps from one call to the next; None where nothing is chosen."""
        chooser = self.layer.chooser if self.layer else None
        return chooser.state() if isinstance(chooser, CheapestChoice) else None

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, now or as soon as the layer is built, so that a resumed run repeats its choices."""
        self._restored = state
        if self.layer is not None and isinstance(self.layer.chooser, CheapestChoice):
            self.layer.chooser.restore(state)

    def _chooser(self, home: list[Tensor], x_SD: Tensor, top_k: int) -> Chooser:
        s, carriers = self.settings, self.carriers
        if s.planner != AUTO and len(carriers.exchanges) == 1:
            planner = make_planner(s.planner, epsilon=s.epsilon, slots=s.slots)
            return FixedChoice(planner, carriers.exchanges[0])
        shape = LayerShape(self.homes, x_SD.shape[0], x_SD.shape[1], top_k, x_SD.dtype)
        prices = carriers.prices(self.pricing, shape, home, self.forward)
        if s.planner == AUTO:
            planners = candidate_planners(prices, carriers.domain.nodes, epsilon=s.epsilon, slots=s.slots)
        else:
            planners = {s.planner: make_planner(s.planner, epsilon=s.epsilon, slots=s.slots)}
        return CheapestChoice(planners, carriers.exchanges, prices, experience=carriers.experience(prices))

    def _inference_chooser(self) -> Chooser:
        """Nothing is priced: with "auto", up to SMALL_ROWS rows a call `all_to_all` without guests, above `dedup`."""
        s = self.settings
        planner = make_planner(
            "bounded" if s.planner == AUTO else s.planner, epsilon=s.epsilon, slots=s.slots
        )
        if s.transport != AUTO:
            return FixedChoice(planner, Exchange(s.transport, s.chunks))
        several = "dedup" in self.carriers.transports
        large = FixedChoice(planner, Exchange("dedup" if several else "all_to_all"))
        return BySize(FixedChoice(make_planner("static"), Exchange("all_to_all")), large, SMALL_ROWS)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        home = bypass_sharding(self.experts, [self.experts._parameters[name] for name in self.names])
        tokens = hidden_states.shape[0]
        if getattr(self.experts, "has_post_expert_norm", False):
            # The norm's gradient is summed over the ranks by a hook of its forward: one without a row calls it too.
            hidden_states = tie(hidden_states, [self.experts.post_expert_norm(hidden_states[:0])], [True])
        if self.tp_mesh.size() > 1:
            # The ranks of a tensor-parallel group hold the same tokens: each takes its slice of them.
            hidden_states, top_k_index, top_k_weights = (
                _slice_over(self.tp_mesh, t) for t in (hidden_states, top_k_index, top_k_weights)
            )
        layer = self.adaptive(home, hidden_states, top_k_index.shape[-1])
        y_SD = layer(home, hidden_states, top_k_index, top_k_weights)
        return _join_over(self.tp_mesh, y_SD, tokens) if self.tp_mesh.size() > 1 else y_SD


def _slice_over(mesh: DeviceMesh, rows_SD: Tensor) -> Tensor:
    """This rank's share of rows that all ranks of `mesh` hold; backward gathers the shares' gradients."""
    whole = DTensor.from_local(rows_SD, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()


def _join_over(mesh: DeviceMesh, rows_SD: Tensor, tokens: int) -> Tensor:
    """All ranks' shares, on every rank."""
    width = rows_SD.shape[-1]
    shares = DTensor.from_local(
        rows_SD.contiguous(), mesh, [Shard(0)], shape=torch.Size((tokens, width)), stride=(width, 1)
    )
    # A copy: `full_tensor` returns a view, and FSDP2 hooks what a layer returns, which must not be one.
    return shares.full_tensor().clone()


def _check_agreement(settings: AdaptiveSettings, group: Any, device_type: str) -> None:
    """Raise RankError where ranks were enabled with different settings: they would plan differently and hang."""
    mine = torch.tensor([settings.digest()], dtype=torch.int64, device=device_type)
    low, high = mine.clone(), mine.clone()
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN, group=group)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX, group=group)
    if int(low) != int(high):
        raise RankError(
            f"ranks disagree; rank {torch.distributed.get_rank()} has {settings}. "
            "Call anabranch.enable with the same arguments on every rank",
            setting="enable",
        )


class UnevenExpertShard(MoEParamShard):
    """`grouped_gemm` without the demand that experts divide evenly: the last ranks' slots stay empty."""

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters.get(param)
        if whole is None:
            return
        if self.shards_expert_dim and hasattr(module, "num_experts"):
            module.num_experts = -(-whole.shape[0] // mesh.size())
            module._is_expert_parallel = True
        shares = distribute_tensor(whole, mesh, [self.placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(shares, requires_grad=whole.requires_grad)


class EvenlyUnlessAdaptive(EpDispatchExpertsParallel):
    """`ep_dispatch_experts` that keeps transformers' demand for even experts where another implementation runs."""

    def install_forward(
        self, module: Any, ep_mesh: DeviceMesh, *, tp_mesh: DeviceMesh, ep_implementation: str = "auto"
    ) -> Any:
        sharded = next((p for p in module.parameters(recurse=False) if isinstance(p, DTensor)), None)
        if ep_implementation != NAME and sharded is not None and sharded.shape[0] % ep_mesh.size():
            raise ValueError(
                f"Cannot evenly shard {sharded.shape[0]} experts across {ep_mesh.size()} expert-parallel ranks: "
                f"use ep_implementation={NAME!r}, or an ep_size that divides them."
            )
        return super().install_forward(module, ep_mesh, tp_mesh=tp_mesh, ep_implementation=ep_implementation)


def register(settings: AdaptiveSettings, pricing: Pricing) -> None:
    """Make `ep_implementation="anabranch"` mean these settings, for models loaded from now on.

    pricing: where `auto` finds what a choice costs.
    """
    implementation = type(
        "AnabranchEP", (AdaptiveEP,), {"settings": settings, "pricing": pricing, "shared": {}}
    )
    EPImplementationInterface.register(NAME, implementation)
    style: Any = UnevenExpertShard(Shard(0), shards_expert_dim=True)  # annotated as a function there
    ALL_PARALLEL_STYLES.register("grouped_gemm", style)
    dispatch: Any = EvenlyUnlessAdaptive()
    ALL_PARALLEL_STYLES.register("ep_dispatch_experts", dispatch)
    load_empty_shares()


def adaptive_layers(model: nn.Module) -> dict[str, AdaptiveEP]:
    """The adaptive layers of a model, by module name, in the model's order."""
    found = ((name, getattr(module, LAYER_ATTRIBUTE, None)) for name, module in model.named_modules())
    return {name: layer for name, layer in found if layer is not None}
