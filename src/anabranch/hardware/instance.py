"""What one rents: an instance with its chips and links, and a cluster of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from anabranch.errors import ConfigError
from anabranch.hardware.chip import Chip
from anabranch.hardware.figure import Figure
from anabranch.hardware.link import Link
from anabranch.hardware.price import Price


@dataclass(frozen=True)
class Instance:
    """One unit of renting: a server, or a rack of servers that is rented whole.

    chips: how many of `chip`. scale_up: levels within the scale-up domain, innermost first; none for a single chip.
    scale_out_gb_per_s: what a chip sends to other domains and instances, while it receives as much, all chips at once;
    None where no source tells. overhead_w: what the node draws beside its chips (processors, memory, cards, fans,
    losses) at full load. Raises ConfigError where the levels do not fit together.
    """

    name: str
    chip: Chip
    chips: int
    scale_up: tuple[Link, ...]
    scale_out_gb_per_s: Figure | None
    overhead_w: Figure | None = None
    prices: Mapping[str, Price] = field(default_factory=dict[str, Price], hash=False)

    def __post_init__(self) -> None:
        inner = 1
        for link in self.scale_up:
            if link.chips <= inner or link.chips % inner:
                raise ConfigError(f"a level of {link.chips} chips on one of {inner}", setting="scale_up")
            if link.shape and math.prod(link.shape) * inner != link.chips:
                sizes = "x".join(map(str, link.shape))
                raise ConfigError(f"{sizes} of {inner} are not {link.chips} chips", setting="scale_up")
            inner = link.chips
        if self.chips < 1 or self.chips % inner:
            raise ConfigError(f"{self.chips} chips are no number of domains of {inner}", setting="chips")

    @property
    def domain(self) -> int:
        """Chips that reach each other without the scale-out network."""
        return self.scale_up[-1].chips if self.scale_up else 1

    def price(self, basis: str) -> Price:
        """Raises ConfigError naming the bases that have one."""
        if basis not in self.prices:
            known = f"it has {', '.join(self.prices)}" if self.prices else "it has none"
            table = f'[instances."{self.name}".prices.{basis}]'
            raise ConfigError(
                f"no {basis} price of {self.name} is known; {known}. Give yours in a TOML file, in {table}",
                setting="basis",
            )
        return self.prices[basis]


@dataclass(frozen=True)
class Cluster:
    """`nodes` instances of one kind. Raises ConfigError naming what cannot be."""

    instance: Instance
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"{self.nodes} given, must be at least 1", setting="nodes")
        if self.nodes > 1 and self.instance.scale_out_gb_per_s is None:
            raise ConfigError(
                f"nothing is known of the network between nodes of {self.instance.name}; give its scale_out in a "
                "TOML file, or use one node",
                setting="nodes",
            )

    @property
    def chip(self) -> Chip:
        return self.instance.chip

    @property
    def chips(self) -> int:
        return self.instance.chips * self.nodes

    @property
    def domain(self) -> int:
        """Chips in a scale-up domain."""
        return self.instance.domain

    @property
    def scale_out(self) -> Link | None:
        """Between domains; None where nothing is known of it."""
        rate = self.instance.scale_out_gb_per_s
        return Link("switched", rate, self.chips) if rate else None

    def link(self, chips: int) -> Link:
        """The outermost level that a group of neighbouring chips crosses. Raises ConfigError where none does."""
        levels = (*self.instance.scale_up, *([self.scale_out] if self.scale_out else []))
        for level in levels:
            if chips <= level.chips:
                return level
        raise ConfigError(f"no link of {self} joins {chips} chips; it has {self.chips}", setting="chips")

    def price_per_hour(self, basis: str) -> Figure:
        """USD an hour of all nodes. Raises ConfigError naming the bases that have a price."""
        return self.instance.price(basis).usd_per_h.scaled(self.nodes)

    @property
    def power_w(self) -> Figure | None:
        """The most that all nodes draw, their overhead included; None where a part of it is unknown."""
        chip, overhead = self.chip.power_w, self.instance.overhead_w
        if chip is None or overhead is None:
            return None
        low = (chip.low * self.instance.chips + overhead.low) * self.nodes
        high = (chip.high * self.instance.chips + overhead.high) * self.nodes
        return Figure(low, high, "W", f"chips ({chip.source}) + overhead ({overhead.source})", "derived")

    def __str__(self) -> str:
        return f"{self.instance.name}:{self.nodes}"
