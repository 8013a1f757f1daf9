"""What an hour of an instance costs, by the way it is bought."""

from dataclasses import dataclass

from anabranch.hardware.figure import Figure

# capacity-block: AWS's reservations of days, weeks ahead. owned: what an own machine costs an hour, by the user.
BASES = ("on-demand", "capacity-block", "reserved", "spot", "owned")


@dataclass(frozen=True)
class Price:
    """USD an hour of one instance. history: what it was before, with dates."""

    basis: str
    usd_per_h: Figure
    history: tuple[Figure, ...] = ()

    @property
    def seen(self) -> tuple[float, float]:
        """The lowest and the highest USD/h of all dates."""
        figures = (self.usd_per_h, *self.history)
        return min(f.low for f in figures), max(f.high for f in figures)
