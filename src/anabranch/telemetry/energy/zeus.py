"""NVIDIA and AMD GPUs, measured by their drivers' counters through zeus (ml.energy/zeus; the extra `energy`)."""

import os
import warnings
from importlib import import_module
from typing import Any

from anabranch.errors import ConfigError
from anabranch.telemetry.record import EnergySource

WINDOW = "anabranch"


class ZeusMeter:
    """Of this rank's GPU (LOCAL_RANK among those visible): the GPU alone, neither its host nor other GPUs.

    Kernels that still run are counted later: synchronise before `joules`. Raises ConfigError where zeus is not
    installed or finds no GPU. Run with zeus 0.16 on one NVIDIA H200.
    """

    source: EnergySource = "zeus"
    whole_machine = False

    def __init__(self) -> None:
        try:
            zeus: Any = import_module("zeus.monitor")
        except ImportError as error:
            raise ConfigError(
                "zeus is not installed; run `pip install 'anabranch[energy]'`", setting="meter"
            ) from error
        visible: list[int] = zeus.ZeusMonitor(cpu_indices=[]).gpu_indices
        if not visible:
            raise ConfigError("zeus finds no GPU here; use another meter", setting="meter")
        mine = visible[int(os.environ.get("LOCAL_RANK", "0")) % len(visible)]
        self._monitor = zeus.ZeusMonitor(gpu_indices=[mine], cpu_indices=[])
        self._monitor.begin_window(WINDOW, sync_execution=False)
        self._used_j = 0.0

    def joules(self) -> float:
        # zeus tells the energy of closed windows; between two of them are microseconds. The counter moves every tenth
        # of a second or so: what a short window misses, which zeus warns of, the next one has.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* was measured as zero")
            self._used_j += self._monitor.end_window(WINDOW, sync_execution=False).total_energy
        self._monitor.begin_window(WINDOW, sync_execution=False)
        return self._used_j
