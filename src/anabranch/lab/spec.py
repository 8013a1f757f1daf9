"""The shape of an emulated cluster: how many nodes and ranks, how fast their links, how much CPU each."""

import re
from dataclasses import dataclass

from anabranch.errors import ConfigError

RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
MBIT = {"k": 1e-3, "m": 1.0, "g": 1e3}
UNLIMITED = "none"
MOST = 64  # nodes, and ranks a node
RATES_MBIT = (1.0, 100_000.0)
# The kernel's smallest quota is 1 ms; the lab's period is 10 ms (lab/cgroups.py).
LEAST_CPU = 0.1


def parse_rate(text: str, setting: str) -> float | None:
    """Megabits (1e6 bits) a second of "500mbit", "1.5gbit" or "800kbit"; None of "none".

    Raises ConfigError naming `setting`.
    """
    if text == UNLIMITED:
        return None
    if not (match := RATE.fullmatch(text.strip().lower())):
        raise ConfigError(f"{text!r} is no rate; write 500mbit, 5gbit or none", setting=setting)
    return float(match[1]) * MBIT[match[2]]


def format_rate(rate_mbit: float | None) -> str:
    """The canonical spelling of a rate: "200mbit", "5gbit", "none"."""
    if rate_mbit is None:
        return UNLIMITED
    return f"{rate_mbit / 1e3:.10g}gbit" if rate_mbit >= 1e3 else f"{rate_mbit:.10g}mbit"


@dataclass(frozen=True)
class LabSpec:
    """nodes, ranks_per_node: the shape. inter_mbit: what each node may send, and what it may receive, in
    megabits a second. intra_mbit: what all ranks of a node together send each other. cpu: cores a rank may
    use (0.45: 4.5 ms of every 10). None: not limited.

    `str(spec)` is its canonical line, such as "2x2 inter=200mbit intra=5gbit cpu=0.45". Raises ConfigError.
    """

    nodes: int = 2
    ranks_per_node: int = 2
    inter_mbit: float | None = None
    intra_mbit: float | None = None
    cpu: float | None = None

    def __post_init__(self) -> None:
        for setting in ("nodes", "ranks_per_node"):
            if not 1 <= getattr(self, setting) <= MOST:
                raise ConfigError(f"{getattr(self, setting)}; use 1 to {MOST}", setting=setting)
        low, high = RATES_MBIT
        for setting in ("inter", "intra"):
            rate_mbit: float | None = getattr(self, f"{setting}_mbit")
            if rate_mbit is not None and not low <= rate_mbit <= high:
                raise ConfigError(
                    f"{format_rate(rate_mbit)} is out of range; use {format_rate(low)} to "
                    f"{format_rate(high)}, or none for an unlimited link",
                    setting=setting,
                )
        if self.cpu is not None and not LEAST_CPU <= self.cpu <= MOST:
            raise ConfigError(
                f"{self.cpu:g} cores; use {LEAST_CPU} to {MOST}: the kernel grants at least 1 ms of each 10",
                setting="cpu",
            )

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        cpu = UNLIMITED if self.cpu is None else f"{self.cpu:.10g}"
        return (
            f"{self.nodes}x{self.ranks_per_node} inter={format_rate(self.inter_mbit)} "
            f"intra={format_rate(self.intra_mbit)} cpu={cpu}"
        )

    def too_much_for(self, cores: int) -> str | None:
        """Why the ranks would not be equal devices on so many cores; None where they are."""
        if self.cpu is None or self.cpu * self.ranks <= 0.95 * cores:
            return None
        return (
            f"{self.ranks} ranks of {self.cpu:g} cores want {self.cpu * self.ranks:.3g} of {cores}: they will "
            f"wait for each other and not be equal devices; use --cpu {int(95 * cores / self.ranks) / 100:g} or less"
        )
