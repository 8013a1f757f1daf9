"""What a layer's parts cost on the ranks at hand: the measurements behind `auto`.

Each time is that of the slowest rank, the median of a few repetitions after one to warm up. Shape suffixes: R
ranks, E experts, S tokens of a rank, K experts a token, N rows, D hidden size, L home slots.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.experts.adaptive import AdaptiveExperts
from anabranch.experts.grouped import ExpertsForward
from anabranch.placement.base import Homes, Planner
from anabranch.placement.choice import Chooser, Exchange, FixedChoice
from anabranch.placement.static import StaticPlanner
from anabranch.placement.trials import levelled
from anabranch.telemetry.samples import CallSample, Samples
from anabranch.transport.base import Transport, Wires
from anabranch.transport.domain import Domain

REPEATS = 5
ONE_SIDED_BYTES = 1 << 20


class LayerShape(NamedTuple):
    """One layer's sizes. tokens: of a micro-batch on this rank; dtype: of its rows."""

    homes: Homes
    tokens: int
    hidden: int
    top_k: int
    dtype: torch.dtype


class Work(NamedTuple):
    """What is measured in turns, forward and backward in ms, as `Samples` has it.

    expert_ms: by rows on every rank, even over its homes. expert_alone_ms: twice a micro-batch's rows on the first
    rank only, as on an overloaded one. call_ms: whole calls of the layer, evenly routed, nothing lent.
    """

    expert_ms: dict[int, float]
    expert_alone_ms: dict[int, float]
    call_ms: tuple[CallSample, ...]


class Probe:
    """Measures one layer on one domain. Every method is collective over the domain."""

    def __init__(
        self, domain: Domain, shape: LayerShape, home: Sequence[Tensor], forward: ExpertsForward
    ) -> None:
        self.domain, self.device = domain, home[0].device
        self.shape = shape._replace(tokens=int(self._slowest(shape.tokens)))
        # The layer's weights, so that caches and layouts are the real ones; their gradients are dropped.
        self.home = [p.detach().requires_grad_() for p in home]
        self.forward = forward

    def samples(
        self,
        transports: Mapping[str, Transport],
        exchanges: Sequence[Exchange],
        planners: Mapping[str, Planner],
        wires: Wires,
    ) -> Samples:
        """All of it."""
        plain = self.shape.hidden * self.shape.dtype.itemsize
        there, back = (c.row_bytes(self.shape.hidden) if c else plain for c in wires.codecs())
        with aside(self.device):
            work = self.work(transports, exchanges)
            return Samples(
                hidden=self.shape.hidden,
                experts=self.shape.homes.experts,
                row_bytes=plain,
                dispatch_row_bytes=there,
                combine_row_bytes=back,
                expert_bytes=sum(torch.Size(p.shape[1:]).numel() * p.element_size() for p in self.home),
                top_k=self.shape.top_k,
                node_R=tuple(self.domain.nodes.node_R.tolist()),
                link_ms=self.links(),
                one_way_ms=self.one_way(),
                alone_ms=self.alone(),
                expert_ms=work.expert_ms,
                expert_alone_ms=work.expert_alone_ms,
                copy_ms_per_mb=self.copy(),
                plan_ms={name: self.planning(planner) for name, planner in planners.items()},
                call_ms=work.call_ms,
            )

    def token_sizes(self) -> list[int]:
        """Whole micro-batches, and quarters of one."""
        return sorted({max(1, self.shape.tokens // 4), max(1, self.shape.tokens)})

    def links(self) -> dict[str, dict[int, float]]:
        """By class of link: bytes each rank sends in all, evenly to its peers of the class -> ms."""
        nodes, rank = self.domain.nodes, self.domain.rank
        near_R = nodes.node_R == nodes.node_R[rank]
        peers = {"inter": ~near_R, "intra": near_R & (np.arange(nodes.ranks) != rank)}
        most = 2 * self.shape.tokens * self.shape.top_k * self.shape.hidden * self.shape.dtype.itemsize
        most = max(most, 1 << 16)  # a line needs two points, however small the micro-batch is
        sizes = [n for n in (1 << 12, 1 << 16, 1 << 19, 1 << 21) if n < most] + [most]
        present = [name for name in ("intra", "inter") if self._slowest(float(peers[name].any()))]
        return {name: {n: self._exchange(peers[name], peers[name], n) for n in sizes} for name in present}

    def one_way(self) -> dict[int, float]:
        """Bytes each rank of an even node sends to the next node, from which nothing returns -> ms."""
        nodes = self.domain.nodes
        if nodes.count == 1 or not nodes.regular:
            return {}
        mine, nobody = int(nodes.node_R[self.domain.rank]), np.zeros(nodes.ranks, dtype=bool)
        partner_R = nodes.node_R == (mine ^ 1)
        to_R, from_R = (partner_R, nobody) if mine % 2 == 0 else (nobody, partner_R)
        return {ONE_SIDED_BYTES: self._exchange(to_R, from_R, ONE_SIDED_BYTES)}

    def alone(self) -> dict[str, dict[int, float]]:
        """One sender a node (or pair of nodes), as a rank that lends a hot expert: by class, bytes -> ms."""
        nodes, rank = self.domain.nodes, self.domain.rank
        if not nodes.regular:
            return {}
        rank_GM, measured = nodes.rank_GM, {}
        pairs = {
            "intra": [(row[0], row[1]) for row in rank_GM if nodes.per_node > 1],
            "inter": list(zip(rank_GM[:-1:2, 0], rank_GM[1::2, 0], strict=True)),
        }
        for name, found in pairs.items():
            to_R, from_R = np.zeros(nodes.ranks, dtype=bool), np.zeros(nodes.ranks, dtype=bool)
            for sender, receiver in found:
                to_R[receiver] |= sender == rank
                from_R[sender] |= receiver == rank
            if found:
                measured[name] = {ONE_SIDED_BYTES: self._exchange(to_R, from_R, ONE_SIDED_BYTES)}
        return measured

    def _exchange(self, to_R: np.ndarray, from_R: np.ndarray, total_bytes: int) -> float:
        peers = max(1, int(to_R.sum()), int(from_R.sum()))
        send, receive = ((ranks_R * (total_bytes // peers)).tolist() for ranks_R in (to_R, from_R))
        sent = torch.zeros(sum(send), dtype=torch.uint8, device=self.device)
        received = torch.empty(sum(receive), dtype=torch.uint8, device=self.device)

        def exchange() -> None:
            for work in self.domain.lanes.start(received, sent, receive, send):
                work.wait()

        return self._timed(exchange)

    def work(self, transports: Mapping[str, Transport], exchanges: Sequence[Exchange]) -> Work:
        """Computation alone and whole calls. In turns: prices are what calls take beyond their computation, and are
        compared with one another, so what else the machine does at times has to be the same for all."""
        everywhere = self._expert_sizes()
        once = 2 * self.shape.tokens * self.shape.top_k
        kinds = [(exchange, tokens) for exchange in exchanges for tokens in self.token_sizes()]
        own = self.home[0].shape[0]
        computations = [partial(self._compute, rows, own) for rows in everywhere]
        alone = partial(self._compute, once if self.domain.rank == 0 else 0, own)
        calls = [
            self._call(FixedChoice(StaticPlanner(), exchange), transports, self._even_ids(tokens))
            for exchange, tokens in kinds
        ]
        ms = iter(self._in_turns([*computations, alone, *calls]))
        return Work(
            expert_ms={rows: next(ms) for rows in everywhere},
            expert_alone_ms={once: next(ms)},
            call_ms=tuple(CallSample(*exchange, tokens, next(ms)) for exchange, tokens in kinds),
        )

    def _expert_sizes(self) -> list[int]:
        even = self.shape.tokens * self.shape.top_k
        parts = (1, 4, 8, 16, 8 * min(4, self.shape.homes.ranks))
        return sorted({max(1, even * part // 8) for part in parts})

    def _in_turns(self, works: Sequence[Callable[[], object]]) -> list[float]:
        """ms of each, over how slow its turns were."""
        turns = [[self._once(work) for work in works] for _ in range(REPEATS + 1)]
        level = levelled([list(times) for times in zip(*turns, strict=True)])
        return [float(np.median(times[1:])) for times in level]

    def _compute(self, rows: int, own: int) -> None:
        if own == 0 or rows == 0:
            return
        ends_J = torch.tensor([rows * (j + 1) // own for j in range(own)], dtype=torch.int32)
        slot_N = torch.repeat_interleave(torch.arange(own), torch.diff(ends_J, prepend=ends_J.new_zeros(1)))
        x_ND = self._rows(rows)
        y_ND = self.forward(self.home, x_ND, ends_J.to(self.device), slot_N.to(self.device))
        torch.autograd.grad(y_ND, [x_ND, *self.home], torch.ones_like(y_ND), allow_unused=True)

    def copy(self) -> float:
        """Gathering a micro-batch's rows by index: ms a megabyte."""
        tokens, top_k = self.shape.tokens, self.shape.top_k
        x_SD = self._rows(tokens).detach()
        index_N = (
            torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(0)).to(self.device)
            // top_k
        )
        moved = tokens * top_k * self.shape.hidden * self.shape.dtype.itemsize
        return self._timed(lambda: x_SD.index_select(0, index_N)) / (moved / 1e6)

    def planning(self, planner: Planner) -> float:
        """Host time of one plan, the first quarter of the experts twice as popular as the rest."""
        homes, rows = self.shape.homes, self.shape.tokens * self.shape.top_k
        share_E = np.where(np.arange(homes.experts) < homes.experts / 4, 2.0, 1.0)
        counts_E = np.floor(rows * share_E / share_E.sum()).astype(np.int64)
        counts_RE = np.tile(counts_E, (homes.ranks, 1))
        return self._timed(lambda: planner.plan(counts_RE, homes))

    def layer(self, chooser: Chooser, transports: Mapping[str, Transport], ids_SK: Tensor) -> float:
        """A whole call of the layer with this routing, forward and backward."""
        return self._timed(self._call(chooser, transports, ids_SK))

    def _call(
        self, chooser: Chooser, transports: Mapping[str, Transport], ids_SK: Tensor
    ) -> Callable[[], None]:
        layer = AdaptiveExperts(self.domain.group, self.shape.homes, chooser, transports, self.forward)
        weights_SK = torch.full(ids_SK.shape, 1.0 / self.shape.top_k, device=self.device, requires_grad=True)
        x_SD = self._rows(ids_SK.shape[0])

        def step() -> None:
            y_SD = layer(self.home, x_SD, ids_SK, weights_SK)
            torch.autograd.grad(y_SD, [x_SD, *self.home], torch.ones_like(y_SD), allow_unused=True)

        return step

    def _even_ids(self, tokens: int) -> Tensor:
        """K distinct experts for each token, drawn evenly; the same on every run."""
        draw = torch.Generator().manual_seed(self.domain.rank)
        ids = torch.rand(tokens, self.shape.homes.experts, generator=draw).argsort(dim=1)[
            :, : self.shape.top_k
        ]
        return ids.to(self.device)

    def _rows(self, rows: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        made = torch.randn(rows, self.shape.hidden, generator=draw).to(self.device, self.shape.dtype)
        return made.requires_grad_()

    def _timed(self, work: Callable[[], object]) -> float:
        work()
        return float(np.median([self._once(work) for _ in range(REPEATS)]))

    def _once(self, work: Callable[[], object]) -> float:
        return slowest_ms(work, self.domain.group, self.device)

    def _slowest(self, value: float) -> float:
        return _most(value, self.domain.group, self.device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is calculated inside leaves the training around it as it was.

    Gradients are enabled, whatever the caller's mode; random numbers are put back; and what autograd saves is hidden
    from activation checkpointing, inside of whose regions layers live: it would count these tensors as its own.
    """
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
    ):
        yield


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def slowest_ms(work: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    """Time of `work` from a common start to the end of the slowest rank. Collective; equal on all ranks."""
    dist.barrier(group)
    started_s = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return _most(1e3 * (time.perf_counter() - started_s), group, device)


def _most(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    most = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return float(most)
