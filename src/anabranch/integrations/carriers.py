"""What the layers of one expert-parallel group share: its transports, and the prices `auto` chooses by."""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.experts.grouped import ExpertsForward
from anabranch.integrations.measure import LayerShape, Probe
from anabranch.placement.base import Planner
from anabranch.placement.choice import Exchange
from anabranch.placement.policy import PLANNERS, make_planner
from anabranch.placement.prices import Prices
from anabranch.placement.pricing import Pricing
from anabranch.placement.trials import Experience
from anabranch.placement.within_node import WithinNode
from anabranch.telemetry.samples import Samples
from anabranch.transport.base import Wires
from anabranch.transport.choose import make_transport
from anabranch.transport.domain import Domain


class Carriers:
    """Transports of the exchanges in question, built once a group, and prices measured once a layer shape."""

    def __init__(self, domain: Domain, exchanges: Sequence[Exchange], wires: Wires) -> None:
        self.domain = domain
        self.exchanges = tuple(exchanges)
        self.wires = wires
        self.transports = {e.transport: make_transport(e.transport, domain, wires) for e in self.exchanges}
        self._prices: dict[str, Prices] = {}
        self._experience: dict[Prices, Experience] = {}

    def prices(
        self, pricing: Pricing, shape: LayerShape, home: Sequence[Tensor], forward: ExpertsForward
    ) -> Prices:
        """Prices for this shape: remembered, from the calibration on rank 0's disk, or measured now. Collective."""
        probe = Probe(self.domain, shape, home, forward)
        key = self._key(probe)
        if key not in self._prices:
            samples = self._stored(pricing, key, probe.device)
            if samples is None:
                samples = probe.samples(self.transports, self.exchanges, self.planners(), self.wires)
                if self.domain.rank == 0:
                    pricing.store(key, samples)
            self._prices[key] = pricing.prices(samples)
        return self._prices[key]

    def experience(self, prices: Prices) -> Experience:
        """What trials told beside these prices: the layers that share the prices share it."""
        return self._experience.setdefault(prices, Experience())

    def planners(self) -> dict[str, Planner]:
        """Every planner that may be priced, with settings of no consequence to its host time."""
        planners = {name: make_planner(name) for name in PLANNERS}
        within = [WithinNode(planners[name], self.domain.nodes) for name in ("bounded", "exact")]
        return planners | {planner.name: planner for planner in within}

    def _key(self, probe: Probe) -> str:
        """A digest of all that a measurement depends on; micro-batches share it up to the next power of two."""
        shape = probe.shape
        facts = {
            "host": socket.gethostname(),
            "lab": os.environ.get("ANABRANCH_LAB", ""),
            "versions": " ".join(
                f"{name} {version(name)}" for name in ("anabranch", "torch", "transformers")
            ),
            "backend": f"{dist.get_backend(self.domain.group)} {torch.get_num_threads()} threads",
            "nodes": str(self.domain.nodes.node_R.tolist()),
            "experts": f"{shape.homes.experts}, {shape.top_k} a token",
            "shape": f"{1 << (shape.tokens - 1).bit_length()} x {shape.hidden} {shape.dtype}",
            "parameters": f"{type(probe.forward).__name__} {[tuple(p.shape) for p in probe.home]}",
            "wires": f"{self.wires.dispatch} {self.wires.combine}",
            "exchanges": " ".join(f"{e.transport}/{e.chunks}" for e in self.exchanges),
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _stored(self, pricing: Pricing, key: str, device: torch.device) -> Samples | None:
        """Rank 0's answer on every rank: they must price alike."""
        found = pricing.load(key) if self.domain.rank == 0 else None
        text: list[Any] = [None if found is None else json.dumps(found.to_json())]
        first = dist.get_process_group_ranks(self.domain.group)[0]
        dist.broadcast_object_list(text, src=first, group=self.domain.group, device=device)
        return None if text[0] is None else Samples.from_json(json.loads(text[0]))
