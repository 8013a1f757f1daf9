"""One number of the catalog: a value or a range, its unit, and where it comes from."""

import math
from dataclasses import dataclass, replace

from anabranch.errors import ConfigError

# Every unit a figure may have: the unit that stands for its kind of quantity, and how many of those it is.
# GB is 1e9 bytes and GiB 2^30; Gb/s is bits.
UNITS: dict[str, tuple[str, float]] = {
    "GFLOP/s": ("TFLOP/s", 1e-3), "TFLOP/s": ("TFLOP/s", 1.0), "PFLOP/s": ("TFLOP/s", 1e3),
    "MiB": ("GiB", 2.0**-10), "GiB": ("GiB", 1.0), "GB": ("GiB", 1e9 / 2**30), "TiB": ("GiB", 2.0**10),
    "Gb/s": ("GB/s", 1 / 8), "GB/s": ("GB/s", 1.0), "GiB/s": ("GB/s", 2**30 / 1e9), "TB/s": ("GB/s", 1e3),
    "W": ("W", 1.0), "kW": ("W", 1e3),
    "USD/h": ("USD/h", 1.0), "USD/kWh": ("USD/kWh", 1.0),
    "pJ/bit": ("pJ/bit", 1.0), "ratio": ("ratio", 1.0),
}  # fmt: skip

# How much a figure is worth. official: the maker's own statement. measured: by whoever the source names.
# secondary: read in a copy of the maker's statement. derived: computed from other figures, the source says how.
# estimate: an analyst's or the press's guess. user: from the user's own file.
CONFIDENCES = ("official", "measured", "secondary", "derived", "estimate", "user")


@dataclass(frozen=True)
class Figure:
    """low..high in `unit`; equal where the sources agree.

    source: who says so, well enough to be found again. date: when it held, "2026-10-07" or "2024-12", "" where the
    source tells none. Raises ConfigError naming the field that is wrong.
    """

    low: float
    high: float
    unit: str
    source: str
    confidence: str
    date: str = ""

    def __post_init__(self) -> None:
        for setting in ("low", "high"):
            bound: float = getattr(self, setting)
            if not math.isfinite(bound) or bound < 0:
                raise ConfigError(f"{bound:g} must be finite and not negative", setting=setting)
        if self.low > self.high:
            raise ConfigError(f"{self.low:g} is above high, {self.high:g}", setting="low")
        if self.unit not in UNITS:
            raise ConfigError(f"{self.unit!r} is no unit; use one of {', '.join(UNITS)}", setting="unit")
        if not self.source.strip():
            raise ConfigError("say who states this figure", setting="source")
        if self.confidence not in CONFIDENCES:
            raise ConfigError(
                f"{self.confidence!r}; use one of {', '.join(CONFIDENCES)}", setting="confidence"
            )

    @property
    def mid(self) -> float:
        """The middle of the range, the value where there is none."""
        return (self.low + self.high) / 2

    @property
    def is_range(self) -> bool:
        """The sources dispute this figure, or state a range themselves."""
        return self.low < self.high

    def scaled(self, factor: float) -> "Figure":
        """`factor` of these, such as the price of so many nodes."""
        return replace(self, low=self.low * factor, high=self.high * factor)

    def in_base(self) -> "Figure":
        """The same in the unit that stands for its kind of quantity: 2.9 TB/s is 2900 GB/s."""
        unit, factor = UNITS[self.unit]
        return replace(self.scaled(factor), unit=unit)

    def __str__(self) -> str:
        amount = f"{self.low:.6g}..{self.high:.6g}" if self.is_range else f"{self.low:.6g}"
        return f"{amount} {self.unit}"
