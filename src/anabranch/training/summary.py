"""What a run came to."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CheckpointError
from anabranch.telemetry.record import StepRecord

# The first steps of a run pay for caches and buffers that later ones find.
WARM_UP = 2


@dataclass(frozen=True)
class RunSummary:
    """One run from its first step, over all its resumptions.

    Speeds are medians and the rest means over its steps, the first two left out as warm-up. eval_loss is None
    for a run that stopped early. losses: of every step.
    """

    planner: str
    steps: int
    stopped_early: bool
    first_loss: float
    last_loss: float
    eval_loss: float | None
    step_ms_median: float
    tokens_per_s: float
    max_mean_before: float
    max_mean_after: float
    guests_per_step: float
    token_mb_per_step: float
    weight_mb_per_step: float
    joules_per_step: float
    joules_per_token: float
    energy_source: str
    losses: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not a finite number (a diverged loss) is None."""
        values = asdict(self) | {"losses": [_finite(loss) for loss in self.losses]}
        return {name: _finite(value) for name, value in values.items()}


def summarise(
    records: Sequence[StepRecord], *, planner: str, stopped_early: bool, eval_loss: float | None
) -> RunSummary:
    """records: all of the run, at least one."""
    steady = records[WARM_UP:] or records

    def median(name: str) -> float:
        return float(np.median([getattr(record, name) for record in steady]))

    def mean(name: str) -> float:
        return float(np.mean([getattr(record, name) for record in steady]))

    return RunSummary(
        planner=planner,
        steps=records[-1].step,
        stopped_early=stopped_early,
        first_loss=records[0].loss,
        last_loss=records[-1].loss,
        eval_loss=eval_loss,
        step_ms_median=median("step_ms"),
        tokens_per_s=median("tokens_per_s"),
        max_mean_before=mean("max_mean_before"),
        max_mean_after=mean("max_mean_after"),
        guests_per_step=mean("guests"),
        token_mb_per_step=mean("token_bytes") / 1e6,
        weight_mb_per_step=mean("weight_bytes") / 1e6,
        joules_per_step=mean("joules"),
        joules_per_token=mean("joules_per_token"),
        energy_source=records[0].energy_source,
        losses=tuple(record.loss for record in records),
    )


def read_records(metrics: Path, last_step: int) -> list[StepRecord]:
    """The records of steps 1 to `last_step` of a metrics.jsonl; CheckpointError where one is missing."""
    names = {field.name for field in fields(StepRecord)}
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    try:
        rows = [json.loads(line) for line in lines[:last_step]]
        if [row["step"] for row in rows] != list(range(1, last_step + 1)):
            raise ValueError(f"it does not hold steps 1 to {last_step}")
        return [StepRecord(**{name: _number(name, row[name]) for name in names}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{metrics} is damaged ({error}); start the run again with --overwrite", setting="resume"
        ) from error


def _number(name: str, value: Any) -> Any:
    """A loss that was not finite is null in the file; only an evaluation may be missing."""
    return math.nan if value is None and name != "eval_loss" else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
