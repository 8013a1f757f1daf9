"""The contract of a sink: where step records go."""

from collections.abc import Sequence
from typing import Protocol

from anabranch.telemetry.record import LayerRecord, StepRecord


class Sink(Protocol):
    """Keeps the records of a run, in the order of steps. One process writes.

    A sink opened with `resumed_step` goes on after that step: what an earlier process wrote of later steps is
    gone or hidden, for they are run again. Opened without, it starts a new run.
    """

    def write(self, record: StepRecord, layers: Sequence[LayerRecord] = ()) -> None:
        """Keep one step, and its layers where the run logs them. On disk when it returns."""
        ...

    def close(self) -> None:
        """No more records. May be called twice."""
        ...
