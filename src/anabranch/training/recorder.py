"""From the Trainer's events to step records, traces, and an orderly stop."""

import signal
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anabranch.experts.adaptive import Observation
from anabranch.integrations.callback import AdaptiveCallback
from anabranch.integrations.transformers import adaptive_layers
from anabranch.telemetry.record import LayerRecord, StepRecord
from anabranch.telemetry.sinks import Sink
from anabranch.workload.trace import TraceWriter


class StepRecorder(TrainerCallback):
    """Writes one `StepRecord` a step to every sink, on the rank that has sinks.

    A record waits for the evaluation of its step, if there is one, and is written before the next step begins.
    """

    def __init__(self, balance: AdaptiveCallback, sinks: Sequence[Sink], tokens_per_step: int) -> None:
        self.balance = balance
        self.sinks = sinks
        self.tokens_per_step = tokens_per_step
        self.records: list[StepRecord] = []
        self._pending: tuple[StepRecord, tuple[LayerRecord, ...]] | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, last = kwargs["logs"], self.balance.last
        if "eval_loss" in logs and self._pending is not None:
            record, layers = self._pending
            self._pending = (replace(record, eval_loss=float(logs["eval_loss"])), layers)
        if "loss" not in logs or last is None:
            return
        record = StepRecord(
            step=state.global_step,
            loss=float(logs["loss"]),
            tokens=self.tokens_per_step,
            step_ms=last.step_ms,
            tokens_per_s=self.tokens_per_step / last.step_ms * 1e3,
            max_mean_before=last.max_mean_before,
            max_mean_after=last.max_mean_after,
            guests=last.guests,
            token_bytes=last.token_bytes,
            weight_bytes=last.weight_bytes,
            plan_ms=last.plan_ms,
            joules=last.joules,
            energy_source=last.energy_source,
            learning_rate=float(logs.get("learning_rate", 0.0)),
            grad_norm=float(logs.get("grad_norm", 0.0)),
        )
        self._pending = (record, last.layers)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.flush()

    def flush(self) -> None:
        """Write the waiting record."""
        if self._pending is None:
            return
        record, layers = self._pending
        self._pending = None
        self.records.append(record)
        for sink in self.sinks:
            sink.write(record, layers)


class OrderlyStop(TrainerCallback):
    """On SIGINT or SIGTERM the run saves a checkpoint and stops, on all ranks after the same step."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = torch.tensor([float(self.asked)], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked.item() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class TraceRecorder(TrainerCallback):
    """Records the routing of every layer and micro-batch of every `every`-th step; rank 0 writes the file.

    Counts are known to every rank. Token-level ids are gathered at the end of a step, when asked for.
    """

    def __init__(self, writer: TraceWriter | None, *, every: int, ids: bool) -> None:
        self.writer = writer
        self.every = every
        self.ids = ids
        self._seen: list[tuple[int, Observation]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for index, layer in enumerate(adaptive_layers(kwargs["model"]).values()):
            layer.observers.append(lambda seen, index=index: self._seen.append((index, seen)))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            return
        micro: dict[int, int] = {}
        for layer, seen in self._seen:
            micro[layer] = micro.get(layer, -1) + 1
            ids = _gathered(seen.ids_SK) if self.ids else None
            if self.writer is not None:
                self.writer.append(
                    layer=layer,
                    step=state.global_step,
                    micro=micro[layer],
                    counts_RE=seen.plan.counts_RE,
                    ids_RSK=ids,
                )


def _gathered(ids_SK: torch.Tensor) -> list[Any]:
    """Every rank's (S, K) ids, in the order of ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, ids_SK.cpu().numpy())
    return parts
