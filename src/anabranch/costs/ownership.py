"""What a run costs whoever pays for it: machines, failures, idle time, energy and people.

    paid hours = productive hours / goodput / occupancy
    total      = USD/h x paid hours  +  [owners: kWh x USD/kWh]  +  engineering hours x rate

goodput: productive over all hours of the run, what failures, restarts and checkpoints leave. occupancy: hours of the
run over the hours that are paid for; a reservation that is half used costs twice. Rent includes electricity.
Lows are made of lows and highs of highs, so both are outer bounds; `planner.compare` draws instead.
"""

from dataclasses import dataclass

import numpy as np

from anabranch.costs.bounds import Bounds, Column, bounds_of, exactly
from anabranch.costs.energy import ClusterPower
from anabranch.errors import ConfigError
from anabranch.hardware.figure import Figure

HOURS_PER_YEAR = 8766.0
USD = Bounds[float]
WITHOUT_LOSS = exactly(1.0)


def _positive(setting: str, value: float) -> None:
    if not value > 0.0:
        raise ConfigError(f"{value:g} must be above 0", setting=setting)


def _at_least_0(setting: str, value: float) -> None:
    if not value >= 0.0:
        raise ConfigError(f"{value:g} must be at least 0", setting=setting)


@dataclass(frozen=True)
class Tenure:
    """By what right one has the machines. usd_per_h: of all nodes.

    usd_per_kwh: what an owner pays for electricity; None for rent, which includes it. basis: one of
    hardware.price.BASES.
    """

    basis: str
    usd_per_h: Bounds[float]
    usd_per_kwh: Bounds[float] | None = None


def rented(basis: str, usd_per_h: Figure) -> Tenure:
    """usd_per_h: of all nodes, `Cluster.price_per_hour(basis)`."""
    return Tenure(basis, bounds_of(usd_per_h))


def owned(capital_usd: float, years: float, usd_per_kwh: Figure, yearly_upkeep: float = 0.0) -> Tenure:
    """Straight-line: the capital, less what it still brings, over every hour of `years`; no interest.

    yearly_upkeep: space, repair and people, as a share of the capital a year; 0 leaves them out.
    """
    _positive("capital_usd", capital_usd)
    _positive("years", years)
    _at_least_0("yearly_upkeep", yearly_upkeep)
    hourly = capital_usd * (1.0 / years + yearly_upkeep) / HOURS_PER_YEAR
    return Tenure("owned", exactly(hourly), bounds_of(usd_per_kwh))


@dataclass(frozen=True)
class Occupation:
    """How a run uses the machines. productive_h: hours of training steps alone. goodput and occupancy: see above.

    utilisation: share of the dense peak in those hours, for energy. Raises ConfigError naming what cannot be.
    """

    productive_h: Bounds[float]
    utilisation: float
    goodput: Bounds[float] = WITHOUT_LOSS
    occupancy: float = 1.0

    def __post_init__(self) -> None:
        _at_least_0("productive_h", self.productive_h.low)
        for setting, shares in {"goodput": self.goodput, "occupancy": (self.occupancy,)}.items():
            if not all(0.0 < share <= 1.0 for share in shares):
                raise ConfigError(f"{min(shares):g} must be above 0 and at most 1", setting=setting)
        if not 0.0 <= self.utilisation <= 1.0:
            raise ConfigError(f"{self.utilisation:g} must be between 0 and 1", setting="utilisation")


@dataclass(frozen=True)
class Engineering:
    """People's time on this run: porting, tuning, watching. Nobody but you knows it, so it is 0 until given."""

    hours: float = 0.0
    usd_per_h: float = 0.0

    def __post_init__(self) -> None:
        _at_least_0("engineering_hours", self.hours)
        _at_least_0("engineering_rate", self.usd_per_h)


@dataclass(frozen=True)
class Spent:
    """Of hours or of USD: on training steps, on failures and checkpoints, on paid hours without a run."""

    productive: Bounds[float]
    failures: Bounds[float]
    idle: Bounds[float]

    @property
    def total(self) -> Bounds[float]:
        return self.productive.plus(self.failures).plus(self.idle)


@dataclass(frozen=True)
class Ownership:
    """machines, energy and engineering in USD. kwh: at the grid's meter, whoever pays. notes: what it leaves out."""

    basis: str
    hours: Spent
    machines: Spent
    kwh: Bounds[float]
    energy: USD
    engineering: USD
    notes: tuple[str, ...]

    @property
    def total(self) -> USD:
        """USD."""
        return self.machines.total.plus(self.energy).plus(self.engineering)


def ownership(
    run: Occupation, tenure: Tenure, power: ClusterPower, engineering: Engineering = Engineering()
) -> Ownership:
    """All that one run costs. power: of the cluster that `tenure` prices."""
    hours = _hours(run)
    machines = Spent(*(tenure.usd_per_h.times(h) for h in (hours.productive, hours.failures, hours.idle)))
    kwh = _kwh(run, hours, power)
    energy = exactly(0.0) if tenure.usd_per_kwh is None else tenure.usd_per_kwh.times(kwh)
    people = exactly(engineering.hours * engineering.usd_per_h)
    return Ownership(tenure.basis, hours, machines, kwh, energy, people, _notes(run, tenure, engineering))


def _hours(run: Occupation) -> Spent:
    """The best goodput belongs to the low end."""
    rows = [
        (productive, productive / goodput - productive, productive / goodput * (1.0 / run.occupancy - 1.0))
        for productive, goodput in zip(run.productive_h, reversed(run.goodput), strict=True)
    ]
    return Spent(*(Bounds(*column) for column in zip(*rows, strict=True)))


def _kwh(run: Occupation, hours: Spent, power: ClusterPower) -> Bounds[float]:
    """Hours lost to failures are mostly work that is done again, and count as busy."""
    busy_w, waiting_w = power.busy_w(np.asarray(run.utilisation)), power.waiting_w()
    at_work = hours.productive.plus(hours.failures)
    return _float(busy_w).times(at_work).plus(_float(waiting_w).times(hours.idle)).scaled(1e-3)


def _float(watts: Bounds[Column]) -> Bounds[float]:
    return Bounds(float(watts.low), float(watts.mid), float(watts.high))


def _notes(run: Occupation, tenure: Tenure, engineering: Engineering) -> tuple[str, ...]:
    told = list[str]()
    if engineering.hours * engineering.usd_per_h == 0.0:
        told.append("engineering hours: none given, so none counted")
    if run.goodput.mid == 1.0:
        told.append("goodput 1: no failure, restart or checkpoint is counted")
    if run.occupancy == 1.0:
        told.append("occupancy 1: no paid hour is idle")
    if tenure.usd_per_kwh is None:
        told.append("electricity is in the rent")
    return tuple(told)
