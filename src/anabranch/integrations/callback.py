"""A `transformers.Trainer` callback that logs what the adaptive layers did."""

import time
import warnings
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anabranch.experts.adaptive import Observation
from anabranch.integrations.transformers import adaptive_layers
from anabranch.placement.base import max_over_mean
from anabranch.telemetry.energy import open_meter
from anabranch.telemetry.record import EnergySource, LayerRecord


class StepBalance(NamedTuple):
    """One optimizer step over all ranks: sums over layers and micro-batches, skew averaged over them."""

    max_mean_before: float
    max_mean_after: float
    guests: int
    token_bytes: int
    weight_bytes: int
    plan_ms: float
    step_ms: float
    joules: float
    energy_source: EnergySource
    layers: tuple[LayerRecord, ...]


class AdaptiveCallback(TrainerCallback):
    """Adds balance, bytes, time and energy to the Trainer's logs, and keeps the last step in `last`.

    Collective: pass it to the Trainer on every rank. Warns once where `slots` are too few for a plan's cap.
    """

    def __init__(self) -> None:
        self.last: StepBalance | None = None
        self._seen: dict[int, list[Observation]] = defaultdict(list)
        self._meter = open_meter()
        self._started_s = 0.0
        self._joules = 0.0
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for index, layer in enumerate(adaptive_layers(kwargs["model"]).values()):
            layer.observers.append(lambda seen, index=index: self._seen[index].append(seen))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen.clear()
        self._started_s, self._joules = time.perf_counter(), self._meter.joules()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step_ms = 1e3 * (time.perf_counter() - self._started_s)
        joules = self._meter.joules() - self._joules
        self.last = _summed(dict(self._seen), step_ms, joules, self._meter.source)
        if not self._warned and any(not layer.fits for layer in self.last.layers):
            self._warned = True
            warnings.warn(
                "anabranch: slots are too few to bring every rank under the cap; raise slots, or epsilon",
                stacklevel=2,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs")
        if logs is not None and self.last is not None and "loss" in logs:
            logs |= {f"balance/{k}": v for k, v in self.last._asdict().items() if isinstance(v, int | float)}


def _summed(
    seen: dict[int, list[Observation]], step_ms: float, joules: float, source: EnergySource
) -> StepBalance:
    """Bytes are added over ranks, and estimated joules too; a RAPL counter already covers the whole machine."""
    token_bytes = [sum(o.token_bytes for o in seen[i]) for i in sorted(seen)]
    weight_bytes = [sum(o.weight_bytes for o in seen[i]) for i in sorted(seen)]
    total = torch.tensor([*token_bytes, *weight_bytes, joules], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        total = total.to(accelerator) if accelerator is not None else total
        dist.all_reduce(total)
    values = total.tolist()
    n = len(token_bytes)
    layers = tuple(
        _layer(i, seen[i], int(values[i]), int(values[n + i])) for i in range(n)
    )
    plans = [o.plan for observed in seen.values() for o in observed]
    count = max(1, len(plans))
    return StepBalance(
        max_mean_before=sum(max_over_mean(p.home_rows_R) for p in plans) / count if plans else 1.0,
        max_mean_after=sum(max_over_mean(p.rows_R) for p in plans) / count if plans else 1.0,
        guests=sum(layer.guests for layer in layers),
        token_bytes=sum(layer.token_bytes for layer in layers),
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        plan_ms=sum(layer.plan_ms for layer in layers),
        step_ms=step_ms,
        joules=joules if source == "rapl" else values[-1],
        energy_source=source,
        layers=layers,
    )


def _layer(index: int, observed: list[Observation], token_bytes: int, weight_bytes: int) -> LayerRecord:
    plans = [o.plan for o in observed]
    return LayerRecord(
        layer=index,
        rows_before_max=sum(int(p.home_rows_R.max()) for p in plans),
        rows_after_max=sum(int(p.rows_R.max()) for p in plans),
        rows_mean=sum(float(p.rows_R.mean()) for p in plans),
        guests=sum(p.guests for p in plans),
        token_bytes=token_bytes,
        weight_bytes=weight_bytes,
        plan_ms=sum(o.plan_ms for o in observed),
        fits=all(p.fits for p in plans),
    )
