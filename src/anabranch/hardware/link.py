"""What joins chips: one level of a machine's network."""

import math
from dataclasses import dataclass

from anabranch.errors import ConfigError
from anabranch.hardware.figure import Figure

# switched: any chip reaches any other through a switch. mesh: each chip has a link to every other. ring, torus: a
# chip has links to its two neighbours in each dimension of `shape`; others forward what is not theirs.
SHAPED = ("ring", "torus")
TOPOLOGIES = ("switched", "mesh", *SHAPED)


@dataclass(frozen=True)
class Link:
    """One level, from the innermost outwards.

    gb_per_s: what a chip sends over all its links of this level, while it receives as much. chips: how many it joins,
    those of inner levels counted. shape: sizes of a torus or ring, in units of the level below it. Raises ConfigError
    naming the field.
    """

    topology: str
    gb_per_s: Figure
    chips: int
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ConfigError(f"{self.topology!r}; use one of {', '.join(TOPOLOGIES)}", setting="topology")
        if (self.topology in SHAPED) != bool(self.shape) or min(self.shape, default=2) < 2:
            raise ConfigError(
                f"{list(self.shape)}; a ring or torus has sizes of at least 2, others have none",
                setting="shape",
            )

    @property
    def hops(self) -> float:
        """Links that a byte crosses on its shortest way between two members, in the mean over all pairs.

        In a ring of n, distances from a member sum to floor(n^2 / 4); the dimensions of a torus add up.
        """
        members = math.prod(self.shape)
        if members < 2:
            return 1.0
        return sum(n * n // 4 * (members // n) for n in self.shape) / (members - 1)

    @property
    def all_to_all_gb_per_s(self) -> Figure:
        """What a chip sends when each sends the same to every other: forwarding takes its share of the links."""
        return self.gb_per_s.scaled(1 / self.hops)
