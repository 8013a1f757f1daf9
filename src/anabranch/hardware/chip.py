"""A chip: what it computes, holds, reads and draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from anabranch.errors import ConfigError
from anabranch.hardware.figure import Figure

# Precisions by their names all over the project, widest first.
PRECISIONS = ("fp32", "bf16", "fp8", "fp4")


@dataclass(frozen=True)
class Chip:
    """One device as a program sees it: a GPU, a Trainium chip with all of its cores, a machine's processors.

    kind: its name in the catalog, "trainium2". family: whose efficiencies it shares, "trainium" or "hopper"; the
    key of calibration. peaks: dense TFLOP/s by precision, without sparsity; ask `peak_tflops`. power_w: the most it
    draws. idle_w: what it draws without work. None where no source tells. devices: what drivers call it.
    """

    kind: str
    family: str
    peaks: Mapping[str, Figure] = field(hash=False)
    memory_gib: Figure
    memory_gb_per_s: Figure
    power_w: Figure | None = None
    idle_w: Figure | None = None
    devices: tuple[str, ...] = ()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those with a known peak, widest first."""
        return tuple(name for name in PRECISIONS if name in self.peaks)

    def peak_tflops(self, precision: str) -> Figure:
        """Dense peak in TFLOP/s. Raises ConfigError where it has none, or no source tells it."""
        if precision not in self.peaks:
            known = ", ".join(self.precisions)
            raise ConfigError(
                f"the catalog knows no {precision} peak of {self.kind}; it has {known}", setting="precision"
            )
        return self.peaks[precision]
