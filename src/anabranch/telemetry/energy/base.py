"""The contract of an energy meter."""

from typing import Protocol

from anabranch.telemetry.record import EnergySource


class EnergyMeter(Protocol):
    """Counts joules from its creation on.

    source: who says so, and whether it is measured: `record.ENERGY_TOLD`. whole_machine: it counts the machine, other
    processes too, so one rank a machine reports it; else each rank has its own share.
    """

    source: EnergySource
    whole_machine: bool

    def joules(self) -> float:
        """Joules since the meter was made; never falls."""
        ...
