"""Step records as JSON lines: one object a step, the fields of `StepRecord` and joules_per_token, and `layers` where
logged."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from anabranch.errors import CheckpointError
from anabranch.telemetry.record import LayerRecord, StepRecord


class JsonlSink:
    """Writes one file of JSON lines. A `Sink`.

    A line is whole or absent: each is one write, and a write that fails half way is taken back. A resumed run
    keeps the lines up to `resumed_step`, without the half line a killed process may have left. Numbers that
    JSON cannot express (the loss of a diverged run) become null. Raises CheckpointError when resuming onto a
    file that holds something else than records.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = "" if resumed_step is None else "".join(_lines_until(path, resumed_step))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(kept, encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("ab", buffering=0)

    def write(self, record: StepRecord, layers: Sequence[LayerRecord] = ()) -> None:
        fields: dict[str, object] = _finite(asdict(record) | {"joules_per_token": record.joules_per_token})
        if layers:
            fields["layers"] = [_finite(layer._asdict()) for layer in layers]
        line = (json.dumps(fields, allow_nan=False) + "\n").encode()
        whole_size = self._file.tell()
        try:
            complete = self._file.write(line) == len(line)
        except OSError:
            self._file.truncate(whole_size)
            raise
        if not complete:
            self._file.truncate(whole_size)
            raise OSError(f"{self.path}: the disk took half a line; the line is taken back")

    def close(self) -> None:
        self._file.close()


def _finite(fields: Mapping[str, object]) -> dict[str, object]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """Whole lines of records up to `step`."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            if _step_of(path, number, line) <= step:
                yield line


def _step_of(path: Path, number: int, line: str) -> int:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        fields = None
    step = cast("dict[str, object]", fields).get("step") if isinstance(fields, dict) else None
    if not isinstance(step, int):
        raise CheckpointError(
            f"{path}, line {number}, is not a step record: remove the file, or resume in another folder",
            setting="resume",
        )
    return step
