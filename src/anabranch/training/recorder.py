"""From the Trainer's events to step records, traces, and an orderly stop."""

import math
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anabranch.integrations.callback import AdaptiveCallback, LayerWatch
from anabranch.integrations.transformers import adaptive_layers
from anabranch.telemetry.record import LayerRecord, StepRecord
from anabranch.telemetry.sinks import Sink
from anabranch.workload.trace import TraceWriter


class StepRecorder(TrainerCallback):
    """Writes one `StepRecord` a step to every sink, on the rank that has sinks.

    A record waits for the evaluation of its step, if there is one: it is written when the next step begins,
    or by `flush`. records: those written, after the ones the recorder was given to begin with.
    """

    def __init__(
        self,
        balance: AdaptiveCallback,
        sinks: Sequence[Sink],
        tokens_per_step: int,
        records: Sequence[StepRecord] = (),
    ) -> None:
        self.balance = balance
        self.sinks = sinks
        self.tokens_per_step = tokens_per_step
        self.records = list(records)
        self._pending: tuple[StepRecord, tuple[LayerRecord, ...]] | None = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
            grad_norm=float(logs.get("grad_norm", math.nan)),
        )
        self._pending = (record, last.layers)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.flush()

    @property
    def eval_loss(self) -> float | None:
        """Of the latest step, where it was evaluated."""
        return None if self._pending is None else self._pending[0].eval_loss

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
    """On SIGINT or SIGTERM the run saves a checkpoint and stops, on all ranks after the same step.

    A context manager: the signals mean that while it is entered. stopped: whether it ended a run early.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "OrderlyStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
            control.should_evaluate = False


class TraceRecorder(TrainerCallback):
    """Records the routing of every layer and micro-batch of every `every`-th step to `path`.

    Counts are known to every rank. Token-level ids are gathered at the end of a step, when asked for. Rank 0
    writes the file, for the ranks that share experts with it. Pass it on every rank.
    """

    def __init__(self, path: Path, *, every: int, ids: bool) -> None:
        self.path = path
        self.every = every
        self.ids = ids
        self._watch = LayerWatch()
        self._writer: TraceWriter | None = None
        self._group: dist.ProcessGroup | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch.attach(kwargs["model"])
        self._group = next(layer.group for layer in adaptive_layers(kwargs["model"]).values())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch.seen.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            return
        micro: Counter[int] = Counter()
        for layer, seen in self._watch.seen:
            ids = self._gathered(seen.ids_SK) if self.ids else None
            if state.is_world_process_zero:
                self._writer = self._writer or self._start(kwargs["model"].config.model_type, seen)
                self._writer.append(
                    layer=layer,
                    step=state.global_step,
                    micro=micro[layer],
                    counts_RE=seen.plan.counts_RE,
                    ids_RSK=ids,
                )
            micro[layer] += 1

    def _start(self, model_type: str, seen: Any) -> TraceWriter:
        tokens, top_k = seen.ids_SK.shape
        homes = seen.plan.homes
        return TraceWriter(
            self.path, model_type=model_type, experts=homes.experts, top_k=top_k, ranks=homes.ranks,
            tokens_per_rank=tokens,
        )  # fmt: skip

    def _gathered(self, ids_SK: torch.Tensor) -> list[Any]:
        """The (S, K) ids of every rank of the group, in the order of ranks."""
        parts: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(parts, ids_SK.cpu().numpy(), group=self._group)
        return parts

    def save(self) -> None:
        """Write what was recorded so far; nothing where nothing was."""
        if self._writer is not None:
            self._writer.save()
