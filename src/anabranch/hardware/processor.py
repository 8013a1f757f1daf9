"""This machine's processors as an instance, measured on the spot."""

import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from anabranch.hardware.chip import Chip
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Instance

CPU = "cpu"
NETWORK = Path("/sys/class/net")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")

# Square fp32 product: large enough for full speed (2 x 1024^3 = 2.1 GFLOP, 4 MiB a matrix).
PRODUCT_ROWS = 1024
# Copied bytes: beyond any cache, so that memory is measured.
COPY_BYTES = 64 << 20
MEASURE_S = 0.25  # each of the two
# Watts of a core under load, memory and fans left out: thermal design power over cores of server processors, from AMD
# EPYC 9654 (360/96) to Intel Xeon 8375C (300/32); as in telemetry/energy/estimate.py.
CORE_W = (3.8, 9.4)


def measure_cpu() -> Instance:
    """Takes about 0.6 s. Speeds are of this process: as many threads as its numpy uses, next to whatever else runs."""
    cores, today = len(os.sched_getaffinity(0)), date.today().isoformat()

    def measured(value: float, unit: str, how: str) -> Figure:
        return Figure(value, value, unit, f"this machine, {cores} cores: {how}", "measured", today)

    rates = [_product_rate(), _copy_rate()]
    chip = Chip(
        kind=CPU,
        family=CPU,
        peaks={"fp32": measured(rates[0] / 1e12, "TFLOP/s", f"numpy product of {PRODUCT_ROWS} rows")},
        memory_gib=measured(_memory_bytes() / 2**30, "GiB", "physical memory, or the cgroup's limit"),
        memory_gb_per_s=measured(rates[1] / 1e9, "GB/s", f"copy of {COPY_BYTES >> 20} MiB, read and written"),
        power_w=Figure(
            CORE_W[0] * cores,
            CORE_W[1] * cores,
            "W",
            f"{CORE_W[0]}..{CORE_W[1]} W a core x {cores}",
            "estimate",
        ),
    )
    network = network_gb_per_s()
    out = measured(network, "GB/s", f"fastest of {NETWORK}/*/speed") if network else None
    return Instance(CPU, chip, 1, (), out, overhead_w=None)


def _product_rate() -> float:
    """FLOP/s."""
    a = np.full((PRODUCT_ROWS, PRODUCT_ROWS), 0.5, np.float32)
    out = np.empty_like(a)
    return 2.0 * PRODUCT_ROWS**3 / _fastest_s(lambda: np.matmul(a, a, out=out))


def _copy_rate() -> float:
    """Bytes a second, those read and those written."""
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    return 2.0 * source.nbytes / _fastest_s(lambda: np.copyto(target, source))


def _fastest_s(run: Callable[[], object]) -> float:
    """The fastest of the runs that fit into `MEASURE_S`; the first one warms up."""
    run()
    best, end = float("inf"), time.perf_counter() + MEASURE_S
    while (start := time.perf_counter()) < end or best == float("inf"):
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _memory_bytes() -> int:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(physical, int(MEMORY_LIMIT.read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical


def network_gb_per_s(root: Path = NETWORK) -> float | None:
    """Of the fastest physical network card that tells its speed."""
    speeds: list[int] = []
    for card in root.glob("*/device"):
        try:
            speeds.append(int((card.parent / "speed").read_text()))
        except (OSError, ValueError):  # a link that is down has none
            continue
    fastest = max(speeds, default=0)
    return fastest / 8e3 if fastest > 0 else None
