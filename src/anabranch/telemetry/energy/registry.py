"""Meters by name, and the one that a run asks for."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from anabranch.errors import ConfigError
from anabranch.telemetry.energy.base import EnergyMeter
from anabranch.telemetry.energy.estimate import EstimateMeter, ModelMeter
from anabranch.telemetry.energy.neuron import NeuronMeter
from anabranch.telemetry.energy.rapl import RaplMeter
from anabranch.telemetry.energy.zeus import ZeusMeter


class Kind(NamedTuple):
    """How a meter is made, of so many numbers, written as `form`."""

    make: Callable[..., EnergyMeter]
    fewest: int = 0
    most: int = 0
    form: str = ""


def _automatic() -> EnergyMeter:
    """RAPL where it may be read, else the estimate."""
    try:
        return RaplMeter()
    except OSError:
        return EstimateMeter()


METERS: Mapping[str, Kind] = {
    "auto": Kind(_automatic),
    "rapl": Kind(RaplMeter),
    "zeus": Kind(ZeusMeter),
    "neuron": Kind(NeuronMeter, 1, 2, ":WATTS[,BACKGROUND_WATTS]"),
    "model": Kind(ModelMeter, 3, 3, ":IDLE_WATTS,MOST_WATTS,BUSY"),  # BUSY from 0 to 1
    "estimate": Kind(EstimateMeter),
}


def open_meter(asked: str = "auto") -> EnergyMeter:
    """The meter named `asked`, such as "rapl" or "neuron:500"; its `source` says what it is.

    Only "auto" falls back. Raises ConfigError where there is no such meter, or it cannot work on this machine.
    """
    name, numbers = _parsed(asked)
    try:
        return METERS[name].make(*numbers)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read here ({error}); use auto", setting="meter") from error


def check_meter(asked: str) -> None:
    """Raises ConfigError where `asked` is no meter; it may still not work on this machine."""
    _parsed(asked)


def _parsed(asked: str) -> tuple[str, list[float]]:
    name, _, text = asked.partition(":")
    if name not in METERS:
        known = ", ".join(name + kind.form for name, kind in METERS.items())
        raise ConfigError(f"{asked!r} is no meter; use one of {known}", setting="meter")
    kind = METERS[name]
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [math.nan]
    fits = kind.fewest <= len(numbers) <= kind.most and all(0.0 <= n < math.inf for n in numbers)
    if not fits or (name == "model" and numbers[2] > 1.0):
        raise ConfigError(f"{asked!r}: write {name}{kind.form}", setting="meter")
    return name, numbers
