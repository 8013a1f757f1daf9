"""Trainium and Inferentia: the driver's percentage of power, times watts that the user states."""

import time
from pathlib import Path

from anabranch.telemetry.record import EnergySource

NEURON = Path("/sys/devices/virtual/neuron_device")
# One line, "POWER_STATUS_VALID,1756000020,0.86,25.00,18.86": status, epoch seconds of the reading, and the least, the
# most and the mean percentage of the last whole minute (aws-neuronx-dkms 2.27, neuron_power.c; runtime release notes).
POWER = "neuron*/stats/power/utilization"
VALID = "POWER_STATUS_VALID"


class NeuronMeter:
    """Of all Neuron devices of the machine: an estimate, labelled so, for AWS does not publish what 100 % is.

    most_w: of one device at 100 %. background_w: what it draws beside, for the driver takes "background power" out of
    its percentage. The driver tells a mean a minute, so joules follow what happens by one to two minutes: right for
    runs of many minutes, not for single steps. A device that tells nothing for a while counts as it did before. Raises
    OSError where there is no device, or one has told nothing yet. Not run on Neuron hardware; tested on files.
    """

    source: EnergySource = "neuron"
    whole_machine = True

    def __init__(self, most_w: float, background_w: float = 0.0, root: Path = NEURON) -> None:
        self._most_w, self._background_w = most_w, background_w
        self._shares = {file: _share(file) for file in sorted(root.glob(POWER))}
        if not self._shares:
            raise FileNotFoundError(f"{root}: no Neuron device that tells its power")
        if None in self._shares.values():
            raise OSError(f"{root}: a device has not told its power yet; a minute after its start it does")
        self._used_j, self._last_s = 0.0, time.monotonic()

    def joules(self) -> float:
        shares = {file: share for file in self._shares if (share := _share(file)) is not None}
        self._shares.update(shares)
        watts = sum(self._background_w + self._most_w * (share or 0.0) for share in self._shares.values())
        now_s = time.monotonic()
        self._used_j += watts * (now_s - self._last_s)
        self._last_s = now_s
        return self._used_j


def _share(file: Path) -> float | None:
    """The minute's mean, between 0 and 1; None where the driver has none."""
    status, *numbers = file.read_text(encoding="utf-8").strip().split(",")
    return float(numbers[3]) / 100.0 if status == VALID else None
