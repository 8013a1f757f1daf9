"""A `transformers.Trainer` callback that logs what the adaptive layers did.

Shape suffixes: R ranks of the world, C calls of adaptive layers in one step, F figures of a call.
"""

import os
import time
import warnings
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anabranch.errors import ConfigError
from anabranch.experts.adaptive import Observation
from anabranch.integrations.transformers import AdaptiveEP, adaptive_layers
from anabranch.telemetry.energy import open_meter
from anabranch.telemetry.record import EnergySource, LayerRecord

FIGURES = 7


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


class Seen(NamedTuple):
    """One forward call of one adaptive layer. layer: the number of its decoder layer, dense ones counted."""

    layer: int
    observation: Observation


class LayerWatch:
    """Collects in `seen`, in the order of calls, what the adaptive layers of a model observe."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._observed: list[tuple[AdaptiveEP, Any]] = []

    def attach(self, model: nn.Module) -> None:
        """Watch this model from now on, and no other."""
        self.detach()
        for name, layer in adaptive_layers(model).items():
            number = decoder_layer(name)

            def observe(observation: Observation, number: int = number) -> None:
                self.seen.append(Seen(number, observation))

            layer.observers.append(observe)
            self._observed.append((layer, observe))

    def detach(self) -> None:
        """Watch nothing, and forget what was seen."""
        for layer, observe in self._observed:
            layer.observers.remove(observe)
        self._observed.clear()
        self.seen.clear()


def decoder_layer(name: str) -> int:
    """The layer's number in a module's name: 3 of `model.layers.3.mlp.experts`; 0 where it has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


class AdaptiveCallback(TrainerCallback):
    """Adds balance, bytes, time and energy to the Trainer's logs, and keeps the last step in `last`.

    The figures are of the step that is logged, under `balance/`. They are in `state.log_history` and in what
    later callbacks see. Reporters that the Trainer makes itself (`report_to`) come before any callback of
    yours and miss them: pass yours after this one, as in `report_to="none",
    callbacks=[AdaptiveCallback(), TensorBoardCallback()]`.

    Collective: pass it to the Trainer on every rank. Warns once where `slots` are too few for a plan's cap.
    meter: of energy, as `telemetry.energy.open_meter` takes it. Raises ConfigError where that cannot be opened, or the
    Trainer does not know that there are several ranks.
    """

    def __init__(self, meter: str = "auto") -> None:
        self.last: StepBalance | None = None
        self._watch = LayerWatch()
        self._meter = open_meter(meter)
        self._started_s = 0.0
        self._joules = 0.0
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size == 1 and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"the Trainer knows of one rank, there are {dist.get_world_size()}, and all would train on the same "
                "data; on CPUs pass use_cpu=True to TrainingArguments",
                setting="use_cpu",
            )
        self._watch.attach(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch.detach()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch.seen.clear()
        self._started_s, self._joules = time.perf_counter(), self._meter.joules()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
            torch.accelerator.synchronize(accelerator)  # the step's kernels may still run
        step_ms = 1e3 * (time.perf_counter() - self._started_s)
        joules = self._meter.joules() - self._joules
        if self._meter.whole_machine and not _first_of_machine():
            joules = 0.0  # another rank tells it
        self.last = _summed(self._watch.seen, step_ms, joules, self._meter.source)
        limited = any(
            layer.settings.planner == "bounded" for layer in adaptive_layers(kwargs["model"]).values()
        )
        if not self._warned and limited and any(not layer.fits for layer in self.last.layers):
            self._warned = True
            if state.is_world_process_zero:
                warnings.warn(
                    "anabranch: slots are too few to bring every rank under the cap; raise slots, or epsilon",
                    stacklevel=2,
                )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs")
        if logs is not None and self.last is not None and "loss" in logs:
            figures = {
                f"balance/{k}": v for k, v in self.last._asdict().items() if isinstance(v, int | float)
            }
            logs.update(figures)
            state.log_history[-1].update(figures)


def _first_of_machine() -> bool:
    """One rank a machine; of a launcher that numbers no local ranks, rank 0 alone."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _summed(seen: list[Seen], step_ms: float, joules: float, source: EnergySource) -> StepBalance:
    """Over all ranks, and so over all groups that share experts: a layer's fullest rank may be in any.

    joules: this rank's share of all.
    """
    calls_RCF, joules_R = _of_all_ranks([_figures(s.observation) for s in seen], joules)
    before_C, after_C, unfit_C = calls_RCF[:, :, :3].max(axis=0).T
    rows_C, guests_C, token_bytes_C, weight_bytes_C = calls_RCF[:, :, 3:].sum(axis=0).T
    mean_C = rows_C / calls_RCF.shape[0]
    layer_C = np.array([s.layer for s in seen], dtype=np.int64)
    plan_ms_C = np.array([s.observation.plan_ms for s in seen])
    # Every rank of a group adds the guests of the group's plan.
    group_size = seen[0].observation.plan.homes.ranks if seen else 1
    layers = tuple(
        LayerRecord(
            layer=int(layer),
            rows_before_max=int(before_C[here].sum()),
            rows_after_max=int(after_C[here].sum()),
            rows_mean=float(mean_C[here].sum()),
            guests=int(guests_C[here].sum()) // group_size,
            token_bytes=int(token_bytes_C[here].sum()),
            weight_bytes=int(weight_bytes_C[here].sum()),
            plan_ms=float(plan_ms_C[here].sum()),
            fits=not unfit_C[here].any(),
        )
        for layer in np.unique(layer_C)
        for here in [layer_C == layer]
    )
    return StepBalance(
        max_mean_before=_mean_ratio(before_C, mean_C),
        max_mean_after=_mean_ratio(after_C, mean_C),
        guests=sum(layer.guests for layer in layers),
        token_bytes=sum(layer.token_bytes for layer in layers),
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        plan_ms=sum(layer.plan_ms for layer in layers),
        step_ms=step_ms,
        joules=float(joules_R.sum()),
        energy_source=source,
        layers=layers,
    )


def _figures(seen: Observation) -> list[int]:
    """The F figures of one call: three that all ranks take the greatest of, four that they add up."""
    plan = seen.plan
    fullest = [int(plan.home_rows_R.max()), int(plan.rows_R.max()), int(not plan.fits)]
    own_rows = int(plan.counts_RE.sum()) // plan.homes.ranks
    return [*fullest, own_rows, plan.guests, seen.token_bytes, seen.weight_bytes]


def _of_all_ranks(
    figures_CF: list[list[int]], joules: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Every rank's figures (R, C, F) and joules (R,), in one exchange of whole numbers."""
    sent = torch.tensor([*chain.from_iterable(figures_CF), round(1e6 * joules)], dtype=torch.int64)
    if dist.is_initialized():
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        sent = sent if accelerator is None else sent.to(accelerator)
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sent)
        known = torch.stack(parts).cpu().numpy()
    else:
        known = sent.numpy()[None]
    return known[:, :-1].reshape(known.shape[0], -1, FIGURES), known[:, -1] / 1e6


def _mean_ratio(fullest_C: NDArray[np.int64], mean_C: NDArray[np.float64]) -> float:
    """Rank max/mean, averaged over calls; 1.0 for a call without load, and for no call."""
    ratio_C = np.divide(fullest_C, mean_C, out=np.ones_like(mean_C), where=mean_C > 0)
    return float(ratio_C.mean()) if ratio_C.size else 1.0
