"""Which accelerators of the catalog this machine has, from what their drivers tell."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from anabranch.hardware.catalog import Catalog
from anabranch.hardware.chip import Chip

# The Neuron driver's description of each device (aws-neuron-sdk docs, neuron-sysfs-user-guide).
NEURON = Path("/sys/devices/virtual/neuron_device")
DEVICE_NAME = "neuron*/info/architecture/device_name"
QUERY = ("--query-gpu=name", "--format=csv,noheader")
QUERY_S = 10.0


class Found(NamedTuple):
    """Accelerators of this machine: so many devices of one chip."""

    chip: Chip
    devices: int


def accelerators(catalog: Catalog, neuron: Path = NEURON) -> Found | None:
    """The chip that this machine has most of; None where it has none, or none that the catalog knows.

    A driver's name stands for one chip (`devices` in the catalog): NVIDIA H100 PCIe is not the catalog's H100.
    """
    kinds = {name: chip for chip in catalog.chips.values() for name in chip.devices}
    known = [name for name in (*_neuron_names(neuron), *_nvidia_names()) if name in kinds]
    if not known:
        return None
    name, devices = Counter(known).most_common(1)[0]
    return Found(kinds[name], devices)


def _neuron_names(root: Path) -> list[str]:
    return [file.read_text(encoding="utf-8").strip() for file in sorted(root.glob(DEVICE_NAME))]


def _nvidia_names() -> list[str]:
    """None of them where nvidia-smi is not there, fails, or does not answer in time."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        run = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in run.stdout.splitlines()]
