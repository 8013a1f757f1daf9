"""Energy used by a run: measured by the processor where it may be read, else estimated and labelled so."""

import time
from pathlib import Path
from typing import Protocol

from anabranch.telemetry.record import EnergySource

POWERCAP = Path("/sys/class/powercap")

# Watts of one busy core, package and its share of idle power included: thermal design power over cores of
# server processors: AMD EPYC 9654 360/96 = 3.8 and 7763 280/64 = 4.4, Intel Xeon 8480+ 350/56 = 6.3 and
# 8375C 300/32 = 9.4. The middle of them; good to a factor of two, and without memory, network or devices.
CORE_POWER_W = 6.0


class EnergyMeter(Protocol):
    """Counts joules from its creation on."""

    source: EnergySource

    def joules(self) -> float:
        """Joules since the meter was made; never falls."""
        ...


class RaplMeter:
    """Reads the package domains of Linux powercap (RAPL, Intel and AMD).

    It counts whole processors, other processes too: one rank a machine should report it. Each counter wraps
    at its max_energy_range_uj (at 200 W after about twenty minutes), so read more often than that. Raises
    OSError where there is no package domain or it may not be read.
    """

    source: EnergySource = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._domains = [
            folder
            for folder in sorted(root.glob("intel-rapl:*"))
            if (folder / "name").read_text().startswith("package")
        ]
        if not self._domains:
            raise FileNotFoundError(f"{root}: no RAPL package domain")
        self._range_uj = [_number(folder / "max_energy_range_uj") for folder in self._domains]
        self._last_uj = self._read_uj()
        self._used_uj = 0

    def joules(self) -> float:
        now_uj = self._read_uj()
        for now, last, wrap in zip(now_uj, self._last_uj, self._range_uj, strict=True):
            self._used_uj += now - last if now >= last else now - last + wrap
        self._last_uj = now_uj
        return self._used_uj / 1e6

    def _read_uj(self) -> list[int]:
        return [_number(folder / "energy_uj") for folder in self._domains]


class EstimateMeter:
    """CPU seconds of this process times `CORE_POWER_W`: an estimate, labelled so. Each rank has its own."""

    source: EnergySource = "estimate"

    def __init__(self) -> None:
        self._start_s = time.process_time()

    def joules(self) -> float:
        return (time.process_time() - self._start_s) * CORE_POWER_W


def open_meter(root: Path = POWERCAP) -> EnergyMeter:
    """RAPL where a package domain can be read, else the estimate. The meter's `source` says which."""
    try:
        return RaplMeter(root)
    except OSError:
        return EstimateMeter()


def _number(file: Path) -> int:
    return int(file.read_text())
