"""One training step, rank by rank: the schedule of the pipeline, the layers, and who waits for whom.

Replayed are the stages of one pipeline with one expert-parallel group on each; other replicas do the same and are met
at the end. Every lane is one rank of such a group. Durations are those of `PublishedPrices`, spread evenly over layers
and micro-batches, as `costs.training.components` adds them up: what experts compute by each rank's own rows, the
exchange by those of the busiest one. Gradients are synchronised at the end of the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from anabranch.errors import ConfigError
from anabranch.placement.base import Plan
from anabranch.simulator.replay import Instruction, Meet, Receive, Replay, Send, Work, replay
from anabranch.simulator.schedule import Pass, passes
from anabranch.simulator.skew import Placed, busiest_copies
from anabranch.simulator.slowdown import PublishedPrices
from anabranch.workload.layout import Layout

# Components of a layer before its experts, of experts by rows, of what every layer's weights cost; once a step.
ATTENTION = ("linear", "attention", "stream", "units", "tensor", "context")
ROWS, ONCE = ("experts", "rows"), ("optimizer", "step")
MOST = 2_000_000  # instructions of a replay: about half a minute


class LayerTimes(NamedTuple):
    """Seconds of one layer and micro-batch in one direction; of `exchange` there and back."""

    attention: float
    rows: float
    weights: float
    exchange: float
    guest: float


@dataclass(frozen=True)
class Timeline:
    """A step of `prices.setup` with its experts placed as told. placed: layers that stand for the model's in equal
    parts. micro_batches: to replay, the step's where None.

    Raises ConfigError where that is more than can be replayed.
    """

    prices: PublishedPrices
    placed: Sequence[Placed]
    micro_batches: int | None = None

    def __post_init__(self) -> None:
        layers, ranks = sum(self._stage_layers), self._layout.ep
        steps = 2 * 5 * self.micros * layers * ranks
        if steps > MOST:
            raise ConfigError(
                f"{self.micros} micro-batches of {layers} layers on groups of {ranks} ranks are {steps:.1g} "
                f"steps to replay, more than {MOST:.1g}; replay fewer micro-batches",
                setting="micro_batches",
            )

    @property
    def micros(self) -> int:
        return self.micro_batches or self._layout.micro_batches

    @cached_property
    def replay(self) -> Replay:
        layout = self._layout
        return replay([self._program(s, r) for s in range(layout.pp) for r in range(layout.ep)])

    def write_trace(self, file: Path) -> None:
        """For chrome://tracing: stages as processes, ranks as threads."""
        self.replay.write_trace(file, self._layout.ep)

    # --------------------------------------------------------------------------------- programs

    def _program(self, stage: int, rank: int) -> Iterator[Instruction]:
        layout, parts = self._layout, self._parts_s
        for one in passes(stage, layout.pp, layout.vp, self.micros):
            yield from self._pass(one, stage, rank)
        yield Meet("gradients", ("data", stage), self._group(stage), parts["data"])
        everyone = range(layout.pp * layout.ep)
        yield Meet("optimizer", ("step",), everyone, sum(parts[name] for name in ONCE))

    def _pass(self, one: Pass, stage: int, rank: int) -> Iterator[Instruction]:
        """Through one chunk; from the virtual stage before it, or after it where it goes backward."""
        sizes, step = self._stage_layers, 1 if one.forward else -1
        place, way = one.chunk * self._layout.pp + stage, "forward" if one.forward else "backward"
        if 0 <= place - step < len(sizes):
            yield Receive((way, place, one.micro, rank))
        first = sum(sizes[:place])
        for layer in range(first, first + sizes[place])[::step]:
            yield from self._layer(layer, one, stage, rank)
        yield Work(f"head {way}", self._chunk_s * (1 / 3 if one.forward else 2 / 3))
        if 0 <= place + step < len(sizes):
            yield Send((way, place + step, one.micro, rank), self._send_s)

    def _layer(self, layer: int, one: Pass, stage: int, rank: int) -> Iterator[Instruction]:
        times, way = self._times[one.forward], "forward" if one.forward else "backward"
        attention = Work(f"attention {way}", times.attention)
        if layer not in self._moe:
            yield attention
            return
        draws = self._loads[layer * len(self._loads) // sum(self._stage_layers)]
        load = draws[one.micro % len(draws)]
        exchange_s, key = times.exchange / 2 * load.max_mean, (way, layer, one.micro)
        lending_s, group = times.guest * load.lent, self._group(stage)
        moe: list[Instruction] = [
            Meet(f"dispatch {way}", ("to", *key), group, exchange_s + lending_s),
            Work(f"experts {way}", times.rows * load.share_R[rank] + times.weights),
            Meet(f"combine {way}", ("from", *key), group, exchange_s),
        ]
        yield from [attention, *moe] if one.forward else [*moe, attention]

    def _group(self, stage: int) -> range:
        return range(stage * self._layout.ep, (stage + 1) * self._layout.ep)

    # -------------------------------------------------------------------------------- durations

    @property
    def _layout(self) -> Layout:
        return self.prices.setup.layout

    @cached_property
    def _stage_layers(self) -> tuple[int, ...]:
        return self._layout.stage_layers(self.prices.setup.shape)

    @cached_property
    def _moe(self) -> frozenset[int]:
        """Layers with experts, modules of multi-token prediction among them."""
        shape = self.prices.setup.shape
        experts = shape.experts.layers if shape.experts else ()
        return frozenset([*experts, *range(shape.layers, shape.layers + shape.mtp)] if experts else [])

    @cached_property
    def _loads(self) -> list[list["_Load"]]:
        return [[_Load.of(plan) for plan in layer.plans] for layer in self.placed]

    @cached_property
    def _parts_s(self) -> dict[str, float]:
        """Balanced components of a step, stretched alike to what the placed one is predicted to take."""
        stretch = self.prices.stretch(self.placed)
        parts = {**self.prices.parts_s(), "guest": self.prices.guest_s}
        return {name: s * stretch for name, s in parts.items()}

    @cached_property
    def _times(self) -> dict[bool, LayerTimes]:
        """By whether it goes forward. Recomputed layers run forward once more in their backward."""
        layout = self._layout
        again, often = 4 / 3 if layout.recompute == "full" else 1.0, layout.micro_batches / layout.pp
        layers, moe = often * sum(self._stage_layers), often * max(1, len(self._moe))

        def times(computes: float, exchanges: float) -> LayerTimes:
            parts = self._parts_s
            return LayerTimes(
                attention=computes * sum(parts[name] for name in ATTENTION) / layers,
                rows=computes * sum(parts[name] for name in ROWS) / moe,
                weights=computes * parts["expert_weights"] / moe,
                exchange=exchanges * parts["exchange"] / moe,
                guest=parts["guest"] / 2 / moe,
            )

        ahead = 1 / (3 * again)
        return {True: times(ahead, 0.5 / again), False: times(1 - ahead, 1 - 0.5 / again)}

    @cached_property
    def _chunk_s(self) -> float:
        """Of head and logits, which every chunk has an equal part of: layers are placed to make up for them."""
        parts = self._parts_s
        return (parts["head"] + parts["logits"]) / (self._layout.micro_batches * self._layout.vp)

    @cached_property
    def _send_s(self) -> float:
        return self._parts_s["pipeline"] / (2 * self._layout.micro_batches * self._layout.vp)


class _Load(NamedTuple):
    """Of one plan: rows of each rank over the mean, those of the busiest, and copies that the busiest one moves."""

    share_R: list[float]
    max_mean: float
    lent: int

    @classmethod
    def of(cls, plan: Plan) -> "_Load":
        share_R = plan.rows_R / plan.rows_R.mean()
        return cls(share_R.tolist(), float(share_R.max()), busiest_copies(plan))
