"""Meters of the energy that a run uses: a contract, one file each, and `open_meter`, which chooses one."""

from anabranch.telemetry.energy.base import EnergyMeter
from anabranch.telemetry.energy.registry import check_meter, open_meter

__all__ = ["EnergyMeter", "check_meter", "open_meter"]
