"""Memory that this process holds, as Linux counts it."""

from pathlib import Path


def resident_bytes() -> int:
    """Now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """At most since the process began."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10
