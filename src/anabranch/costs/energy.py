"""Energy of a cluster at the grid's meter, from how busy its chips are.

A chip draws idle + (most - idle) x busy(u) watts, where u is the share of its dense peak that it achieves:

    busy(u) = FLOOR + (1 - FLOOR) x min(1, u / FULL)        while it runs, 0 while it waits for work

A node adds its overhead, the building its PUE. Nothing of this was measured by us. The curve is one straight line
through published points, and no more is known of Trainium's than of NVIDIA's.
"""

from dataclasses import dataclass, replace

import numpy as np

from anabranch.costs.bounds import Bounds, Column
from anabranch.errors import ConfigError
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Cluster

# What a chip that works draws of its range however few FLOPs it does, because it reads memory: decoding with batch 1,
# H100 267 W = 31 % of 72..700, B200 452 W = 36 % of 140..1000 (serialalice.pt, 2026-06).
FLOOR = 0.33
# Share of the dense peak from which it draws its most: HGX H100 in hard training draws 76 % of its 10.2 kW
# (arXiv:2506.14551), which is 506 W a GPU with 3.7 kW beside them; at 40 % of peak, as good published runs have, that
# is 0.75. A single point, and the paper does not tell its runs' share of peak.
FULL = 0.75
# Ninety of a hundred predictions err by less. The best published node model errs by 11.4 % in the mean
# (arXiv:2506.14551); normal errors with that mean are within 23.5 %. Rated power in place of a model errs by 27-37 %.
MODEL_ERROR = 0.235
# Where the catalog has no figure, from those of NVIDIA: idle over most is 0.10 (H100) to 0.19 (B300), overhead over the
# chips' most is 0.2 (GB300 NVL72) to 1.0 (DGX A100).
IDLE_SHARE = (0.10, 0.19)
OVERHEAD_SHARE = (0.2, 1.0)
# Overhead is told at full load. Without work fans and losses are less; assumed, from this much of it to all.
WAITING_OVERHEAD = 0.5


@dataclass(frozen=True)
class ClusterPower:
    """Of all chips together, and of all nodes' overhead. pue: of the building. assumptions: what no source tells."""

    idle_w: Figure
    most_w: Figure
    overhead_w: Figure
    pue: Figure
    assumptions: tuple[str, ...] = ()

    def busy_w(self, utilisation: Column) -> Bounds[Column]:
        """Watts while chips run at these shares of their dense peak, recomputation counted as work.

        Bounds hold about ninety of a hundred: the figures' ranges and the curve's error, as if independent.
        """
        used = np.asarray(utilisation, dtype=np.float64)
        share = FLOOR + (1.0 - FLOOR) * np.clip(used / FULL, 0.0, 1.0)
        return self._grid_w(share, self.overhead_w)

    def waiting_w(self) -> Bounds[Column]:
        """Watts while nothing runs."""
        return self._grid_w(
            np.zeros(()), replace(self.overhead_w, low=WAITING_OVERHEAD * self.overhead_w.low)
        )

    def kwh(self, utilisation: Column, busy_h: Column, waiting_h: Column | float = 0.0) -> Bounds[Column]:
        """Energy of hours at work and hours without."""
        rows = zip(self.busy_w(utilisation), self.waiting_w(), strict=True)
        return Bounds(*((busy * busy_h + waiting * waiting_h) / 1e3 for busy, waiting in rows))

    def _grid_w(self, share: Column, overhead_w: Figure) -> Bounds[Column]:
        chips = _Part.of(self.idle_w).mixed(_Part.of(self.most_w), share)
        overhead = _Part.of(overhead_w)
        node_w = chips.mid + overhead.mid
        error = np.sqrt(
            (chips.half**2 + overhead.half**2) / node_w**2
            + (_Part.of(self.pue).half / self.pue.mid) ** 2
            + MODEL_ERROR**2
        )
        watts = node_w * self.pue.mid
        return Bounds(watts / (1.0 + error), watts, watts * (1.0 + error))


@dataclass(frozen=True)
class _Part:
    """The middle of a range and half its width."""

    mid: Column
    half: Column

    @classmethod
    def of(cls, figure: Figure) -> "_Part":
        return cls(np.asarray(figure.mid), np.asarray((figure.high - figure.low) / 2))

    def mixed(self, other: "_Part", share: Column) -> "_Part":
        """`share` of the way to the other; both ranges are of one chip, so their halves add up."""
        return _Part(self.mid + (other.mid - self.mid) * share, self.half + (other.half - self.half) * share)


def power_of(cluster: Cluster, pue: Figure) -> ClusterPower:
    """pue: a figure of the catalog or one's own; 1 for what the racks alone draw.

    Raises ConfigError where nothing tells what a chip draws, or a PUE is below 1.
    """
    if pue.low < 1.0:
        raise ConfigError(
            f"{pue}: a building draws at least what its machines do, so at least 1", setting="pue"
        )
    chip, instance = cluster.chip, cluster.instance
    told = [
        f"a busy chip draws {FLOOR:.0%} of its range, all of it from {FULL:.0%} of its peak; good to {MODEL_ERROR:.0%}"
    ]
    if chip.power_w is None:
        raise ConfigError(
            f"nothing tells what a {chip.kind} draws; give its power in a TOML file, in [chips.{chip.kind}]",
            setting="power",
        )
    idle_w, overhead_w = chip.idle_w, instance.overhead_w
    if idle_w is None:
        idle_w = _share(chip.power_w, IDLE_SHARE)
        told.append(f"idle power of {chip.kind}: {IDLE_SHARE[0]:.0%} to {IDLE_SHARE[1]:.0%} of its most")
    if overhead_w is None:
        overhead_w = _share(chip.power_w.scaled(instance.chips), OVERHEAD_SHARE)
        told.append(
            f"overhead of {instance.name}: {OVERHEAD_SHARE[0]:.0%} to {OVERHEAD_SHARE[1]:.0%} of its chips"
        )
    if chip.power_w.confidence == "estimate":
        told.append(f"power of {chip.kind} is an estimate: {chip.power_w} ({chip.power_w.source})")
    return ClusterPower(
        idle_w.scaled(cluster.chips),
        chip.power_w.scaled(cluster.chips),
        overhead_w.scaled(cluster.nodes),
        pue,
        tuple(told),
    )


def _share(most: Figure, share: tuple[float, float]) -> Figure:
    low, high = most.low * share[0], most.high * share[1]
    return Figure(low, high, "W", f"{share[0]:.0%} to {share[1]:.0%} of {most}", "estimate")
