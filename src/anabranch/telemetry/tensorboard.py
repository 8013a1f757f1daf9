"""Step records as TensorBoard scalars, written by TensorBoard itself without TensorFlow or torch."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tensorboard.summary.writer.event_file_writer import (  # pyright: ignore[reportMissingTypeStubs]
    EventFileWriter,
)

from anabranch.telemetry.record import LayerRecord, StepRecord

# Generated at import by protobuf: no checker can see what is in them.
_events: Any = import_module("tensorboard.compat.proto.event_pb2")
_summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")

_GROUPS = {
    "train": ("loss", "eval_loss", "learning_rate", "grad_norm"),
    "balance": ("max_mean_before", "max_mean_after", "guests", "token_bytes", "weight_bytes", "plan_ms"),
    "speed": ("step_ms", "tokens_per_s", "tokens"),
}


class TensorboardSink:
    """Writes an event file into a folder. A `Sink`.

    A resumed run adds a file whose first event tells TensorBoard to drop what earlier files hold from
    `resumed_step + 1` on.
    """

    def __init__(self, folder: Path, *, resumed_step: int | None = None) -> None:
        self._writer: Any = EventFileWriter(str(folder))
        if resumed_step is not None:
            start = _events.SessionLog(status=_events.SessionLog.START)
            self._add(resumed_step + 1, session_log=start)

    def write(self, record: StepRecord, layers: Sequence[LayerRecord] = ()) -> None:
        fields = asdict(record)
        scalars = {f"{group}/{name}": fields[name] for group, names in _GROUPS.items() for name in names}
        scalars[f"energy/joules_{record.energy_source}"] = record.joules
        scalars[f"energy/joules_per_token_{record.energy_source}"] = record.joules_per_token
        for layer in layers:
            name = f"layer_{layer.layer:03d}"
            scalars[f"{name}/max_mean_before"] = layer.max_mean_before
            scalars[f"{name}/max_mean_after"] = layer.max_mean_after
            scalars[f"{name}/guests"] = layer.guests
        values = [
            _summaries.Summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items() if v is not None
        ]
        self._add(record.step, summary=_summaries.Summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(_events.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()
