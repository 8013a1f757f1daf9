"""Estimated from time, where nothing measures."""

import time

from anabranch.telemetry.record import EnergySource

# Watts of one busy core, package and its share of idle power included: thermal design power over cores of
# server processors: AMD EPYC 9654 360/96 = 3.8 and 7763 280/64 = 4.4, Intel Xeon 8480+ 350/56 = 6.3 and
# 8375C 300/32 = 9.4. The middle of them; good to a factor of two, and without memory, network or devices.
CORE_POWER_W = 6.0


class EstimateMeter:
    """CPU seconds of this process times `CORE_POWER_W`: an estimate, labelled so. Each rank has its own."""

    source: EnergySource = "estimate"
    whole_machine = False

    def __init__(self) -> None:
        self._start_s = time.process_time()

    def joules(self) -> float:
        return (time.process_time() - self._start_s) * CORE_POWER_W


class ModelMeter:
    """Wall seconds of this rank's chip times idle_w + (most_w - idle_w) x busy: an estimate, labelled so.

    busy: the share of its range that the chip draws, between 0 and 1; `costs.energy` has a curve for it.
    """

    source: EnergySource = "model"
    whole_machine = False

    def __init__(self, idle_w: float, most_w: float, busy: float) -> None:
        self._watts = idle_w + (most_w - idle_w) * busy
        self._start_s = time.monotonic()

    def joules(self) -> float:
        return (time.monotonic() - self._start_s) * self._watts
