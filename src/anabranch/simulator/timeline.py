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
        layout, layers = self.prices.setup.layout, sum(self._stage_layers)
        steps = 2 * 5 * self.micros * layers * layout.ep
        if steps > MOST:
            raise ConfigError(
                f"{self.micros} micro-batches of {layers} layers on groups of {layout.ep} ranks are {steps:.1g} "
                f"steps to replay, more than {MOST:.1g}; replay fewer micro-batches",
                setting="micro_batches",
            )

    @property
    def micros(self) -> int:
        return self.micro_batches or self.prices.setup.layout.micro_batches

    @cached_property
    def replay(self) -> Replay:
        layout = self.prices.setup.layout
        return replay([self._program(s, r) for s in range(layout.pp) for r in range(layout.ep)])

    def write_trace(self, file: Path) -> None:
        """For chrome://tracing: stages as processes, ranks as threads."""
        ranks = self.prices.setup.layout.ep
        lanes = range(self.prices.setup.layout.pp * ranks)
        self.replay.write_trace(file, {i: (f"stage {i // ranks}", f"rank {i % ranks}") for i in lanes})

    # --------------------------------------------------------------------------------- programs

    def _program(self, stage: int, rank: int) -> Iterator[Instruction]:
        layout = self.prices.setup.layout
        for one in passes(stage, layout.pp, layout.vp, self.micros):
            yield from self._pass(one, stage, rank)
        everyone = range(layout.pp * layout.ep)
        yield Meet("gradients", ("data", stage), self._group(stage), self._parts_s["data"])
        yield Meet("optimizer", ("step",), everyone, sum(self._parts_s[name] for name in ONCE))

    def _pass(self, one: Pass, stage: int, rank: int) -> Iterator[Instruction]:
        """Through one chunk; from the virtual stage before it, or after it where it goes backward."""
        pp, vp = self.prices.setup.layout.pp, self.prices.setup.layout.vp
        place, step = one.chunk * pp + stage, 1 if one.forward else -1
        way = "forward" if one.forward else "backward"
        if 0 <= place - step < pp * vp:
            yield Receive((way, place, one.micro, rank))
        for layer in self._layers_of(place)[::step]:
            yield from self._layer(layer, one, stage, rank)
        yield Work(f"head {way}", self._head_s(one.forward))
        if 0 <= place + step < pp * vp:
            yield Send((way, place + step, one.micro, rank), self._send_s)

    def _layer(self, layer: int, one: Pass, stage: int, rank: int) -> Iterator[Instruction]:
        times, way = self._times[one.forward], "forward" if one.forward else "backward"
        attention = Work(f"attention {way}", times.attention)
        if layer not in self._moe:
            yield attention
            return
        load = self._loads[layer * len(self._loads) // sum(self._stage_layers)][one.micro % self._draws]
        exchange_s, key = times.exchange / 2 * load.max_mean, (way, layer, one.micro)
        lending_s, group = times.guest * load.lent, self._group(stage)
        moe: list[Instruction] = [
            Meet(f"dispatch {way}", ("to", *key), group, exchange_s + lending_s),
            Work(f"experts {way}", times.rows * load.share_R[rank] + times.weights),
            Meet(f"combine {way}", ("from", *key), group, exchange_s),
        ]
        yield from [attention, *moe] if one.forward else [*moe, attention]

    def _group(self, stage: int) -> range:
        ranks = self.prices.setup.layout.ep
        return range(stage * ranks, (stage + 1) * ranks)

    # -------------------------------------------------------------------------------- durations

    @cached_property
    def _stage_layers(self) -> tuple[int, ...]:
        return self.prices.setup.layout.stage_layers(self.prices.setup.shape)

    def _layers_of(self, place: int) -> range:
        first = sum(self._stage_layers[:place])
        return range(first, first + self._stage_layers[place])

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
    def _draws(self) -> int:
        return len(self.placed[0].plans)

    @cached_property
    def _parts_s(self) -> dict[str, float]:
        """Balanced components of a step, stretched alike to what the placed one is predicted to take."""
        return {name: s * self._stretch for name, s in self.prices.parts_s().items()}

    @cached_property
    def _stretch(self) -> float:
        return self.prices.stretch(self.placed)

    @cached_property
    def _often(self) -> float:
        """Micro-batches of a step over those of one layer: what a component is divided by, times its layers."""
        layout = self.prices.setup.layout
        return layout.micro_batches / layout.pp

    @cached_property
    def _times(self) -> dict[bool, LayerTimes]:
        """By whether it goes forward. Recomputed layers run forward once more in their backward."""
        again = 4 / 3 if self.prices.setup.layout.recompute == "full" else 1.0
        layers, moe = self._often * sum(self._stage_layers), self._often * max(1, len(self._moe))

        def times(computes: float, exchanges: float) -> LayerTimes:
            parts = self._parts_s
            return LayerTimes(
                attention=computes * sum(parts[name] for name in ATTENTION) / layers,
                rows=computes * sum(parts[name] for name in ROWS) / moe,
                weights=computes * parts["expert_weights"] / moe,
                exchange=exchanges * parts["exchange"] / moe,
                guest=self.prices.guest_s * self._stretch / 2 / moe,
            )

        ahead = 1 / (3 * again)
        return {True: times(ahead, 0.5 / again), False: times(1 - ahead, 1 - 0.5 / again)}

    def _head_s(self, forward: bool) -> float:
        """Of head and logits, which every chunk has an equal part of: layers are placed to make up for them."""
        layout = self.prices.setup.layout
        often = layout.micro_batches * layout.vp
        return (1 / 3 if forward else 2 / 3) * (self._parts_s["head"] + self._parts_s["logits"]) / often

    @cached_property
    def _send_s(self) -> float:
        layout = self.prices.setup.layout
        return self._parts_s["pipeline"] / (2 * layout.micro_batches * layout.vp)


class _Load(NamedTuple):
    """Of one plan: rows of each rank over the mean, those of the busiest, and copies that the busiest one moves."""

    share_R: list[float]
    max_mean: float
    lent: int

    @classmethod
    def of(cls, plan: Plan) -> "_Load":
        share_R = plan.rows_R / plan.rows_R.mean()
        return cls(share_R.tolist(), float(share_R.max()), busiest_copies(plan))
