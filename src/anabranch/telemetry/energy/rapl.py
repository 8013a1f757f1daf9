"""Measured by the processor: the energy counters of Linux powercap."""

from pathlib import Path

from anabranch.telemetry.record import EnergySource

POWERCAP = Path("/sys/class/powercap")


class RaplMeter:
    """Reads the package domains of Linux powercap (RAPL, Intel and AMD): processors alone, no memory or device.

    Each counter wraps at its max_energy_range_uj (at 200 W after about twenty minutes), so read more often than
    that. Raises OSError where there is no package domain or it may not be read.
    """

    source: EnergySource = "rapl"
    whole_machine = True

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


def _number(file: Path) -> int:
    return int(file.read_text())
