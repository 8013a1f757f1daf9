"""What a layout comes to over the whole run: hours, dollars and energy, each with an interval."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from anabranch.costs.bounds import Bounds, bounds_of, exactly
from anabranch.costs.energy import ClusterPower, power_of
from anabranch.costs.ownership import Engineering, Occupation, Ownership, Tenure, ownership
from anabranch.costs.training.calibration import Calibration, Interval
from anabranch.costs.training.columns import columns_of
from anabranch.costs.training.efficiency import HOST, step_of
from anabranch.costs.training.memory_error import Peaks, peaks_within
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Cluster
from anabranch.hardware.price import BASES
from anabranch.planner.search import Candidate, Request
from anabranch.simulator.goodput import NODE_MTBF_H, Failures
from anabranch.units import HOUR_S

# What a user who says nothing is taken to pay: the first of these that an instance has. Spot may be taken away.
USUAL_BASES = (*(basis for basis in BASES if basis != "spot"), "spot")
NO_ENGINEERING = Engineering()
# Hours between failures of a node over Llama 3's, seconds that a checkpoint stops the run, seconds of a restart: at
# worst, as expected, at best. The seconds are assumptions; the middle ones leave 16,384 GPUs of Llama 3's what its
# authors report, more than 90 % (arXiv:2407.21783, section 3.3.4).
FAILURES = ((1 / 2, 60.0, 900.0), (1.0, 20.0, 300.0), (3.0, 5.0, 120.0))


@dataclass(frozen=True)
class Terms:
    """How the machines are had. basis: of the price, None for the usual one. goodput: None for what `FAILURES` leave;
    see `anabranch.costs.ownership` for the rest. pue and usd_per_kwh: figures of the catalog, or one's own."""

    pue: Figure
    usd_per_kwh: Figure
    basis: str | None = None
    occupancy: float = 1.0
    goodput: Bounds[float] | None = None
    engineering: Engineering = NO_ENGINEERING

    def basis_of(self, cluster: Cluster) -> str | None:
        """None where no price is known and none was asked for."""
        return self.basis or next((b for b in USUAL_BASES if b in cluster.instance.prices), None)

    def goodput_of(self, cluster: Cluster) -> Bounds[float]:
        if self.goodput is not None:
            return self.goodput
        shares = (
            Failures(NODE_MTBF_H * often, cluster.nodes, stop_s, restart_s).goodput()
            for often, stop_s, restart_s in FAILURES
        )
        return Bounds(*shares)

    def tenure(self, cluster: Cluster) -> Tenure:
        """Free where no price is known. Raises ConfigError where there is none of the basis that was asked for."""
        basis = self.basis_of(cluster)
        if basis is None:
            return Tenure("no price", exactly(0.0))
        electricity = bounds_of(self.usd_per_kwh) if basis == "owned" else None
        return Tenure(basis, bounds_of(cluster.price_per_hour(basis)), electricity)


class Cost(NamedTuple):
    """At one level of confidence. hours: of the run, failures included. usd: None where no price is known. memory: None
    where no measured peak is known."""

    hours: Bounds[float]
    usd: Bounds[float] | None
    kwh: Bounds[float]
    owned: Ownership
    memory: Peaks | None


class Outcome(NamedTuple):
    """Of one layout. within80 and within90 hold so many of 100 runs, as far as the time of a step tells: dollars and
    energy are outer bounds, ends of the time with ends of the price or the power. mfu: the model's FLOPs over the dense
    peak."""

    request: Request
    candidate: Candidate
    within80: Cost
    within90: Cost
    mfu: float
    power: ClusterPower


def outcome(request: Request, candidate: Candidate, terms: Terms, calibration: Calibration) -> Outcome:
    """Raises ConfigError where no price of the basis that was asked for is known, or no power of the chip."""
    step = candidate.step
    mfu, power = utilisation(request, step.step_s), power_of(request.cluster, terms.pue)
    again = 4.0 / 3.0 if candidate.layout.recompute == "full" else 1.0
    tenure, goodput = terms.tenure(request.cluster), terms.goodput_of(request.cluster)
    lost = Bounds(*(1.0 / share for share in reversed(goodput)))

    def cost(interval: Interval, share: float) -> Cost:
        hours = Bounds(interval.low, step.step_s, interval.high).scaled(request.steps / HOUR_S)
        run = Occupation(hours, min(1.0, mfu * again), goodput, terms.occupancy)
        owned = ownership(run, tenure, power, terms.engineering)
        usd = None if terms.basis_of(request.cluster) is None else owned.total
        memory = peaks_within(calibration.memory_ratios, candidate.memory_bytes, share)
        return Cost(hours.times(lost), usd, owned.kwh, owned, memory)

    return Outcome(request, candidate, cost(step.within80, 0.8), cost(step.within90, 0.9), mfu, power)


def utilisation(request: Request, step_s: float) -> float:
    """FLOPs of forward and backward over the dense peak of all chips, without recomputation."""
    flops = 3.0 * request.shape.forward_flops(request.seq_len).total * request.global_batch * request.seq_len
    peak = request.cluster.chip.peak_tflops(request.precision).mid * 1e12 * request.cluster.chips
    return flops / (peak * step_s)


# Parts of a step as a reader thinks of them, of the formula's components.
GROUPS = {
    "matrix products": ("linear", "head"),
    "attention": ("attention",),
    "experts": ("experts", "expert_weights", "rows"),
    "memory traffic": ("stream", "units", "logits", "optimizer"),
    "tensor parallel": ("tensor",),
    "rows to experts": ("exchange",),
    "context parallel": ("context",),
    "weights, gradients": ("data",),
    "pipeline sends": ("pipeline",),
    "fixed": ("step",),
}
ONE_PRICE = 0.2  # how far a price of which no other date is known is moved, to either side
SKEWED = ("experts", "rows", "exchange")  # these wait for the busiest rank


def breakdown(candidate: Candidate, calibration: Calibration) -> dict[str, float]:
    """Seconds of a step by part. They are the formula's, all scaled by what it misses, so that they sum to the step."""
    columns, skew = columns_of([candidate.setup]), candidate.setup.skew
    seconds = {name: float(part[0]) for name, part in calibration.efficiency.parts_s(columns).items()}
    parts = dict.fromkeys((*GROUPS, "busiest rank", "host", "bubble"), 0.0)
    for group, names in GROUPS.items():
        for name in names:
            waits = seconds[name] * (1.0 - 1.0 / skew) if name in SKEWED else 0.0
            parts[group] += seconds[name] - waits
            parts["busiest rank"] += waits
    once = float(step_of({name: np.array([part]) for name, part in seconds.items()}, np.zeros(1))[0])
    parts["host"] = once - sum(part for name, part in seconds.items() if name not in HOST)
    layout = candidate.layout
    bubble = (layout.pp - 1) / (layout.vp * layout.micro_batches)
    parts["bubble"] = once * bubble * calibration.efficiency.factors["bubble"]
    scale = candidate.step.step_s / sum(parts.values())
    return {name: part * scale for name, part in parts.items() if part > 0.0}


class Swing(NamedTuple):
    """What one assumption does to an amount while all others stay: the amount at either end of its range."""

    name: str
    low: float
    high: float
    low_means: str
    high_means: str


def sensitivity(found: Outcome, calibration: Calibration) -> list[Swing]:
    """Of dollars, or of hours where no price is known; the widest swing first."""
    request, candidate, cost = found.request, found.candidate, found.within90
    amount = cost.usd.mid if cost.usd else cost.hours.mid
    # All dollars but those of energy and engineering go with the hours, and they are few.
    slower = cost.hours.scaled(1.0 / cost.hours.mid)
    fastest, slowest = (utilisation(request, candidate.step.step_s * by) for by in (slower.low, slower.high))
    swings = [Swing("MFU", amount * slower.low, amount * slower.high, f"{fastest:.0%}", f"{slowest:.0%}")]
    if cost.usd and cost.owned.machines.total.mid > 0.0:  # one's own may cost nothing an hour
        price = request.cluster.instance.price(cost.owned.basis)
        mid, (low, high) = price.usd_per_h.mid, price.seen
        if low == high:
            low, high = mid * (1.0 - ONE_PRICE), mid * (1.0 + ONE_PRICE)
        machines = cost.owned.machines.total.mid
        cheap, dear = (machines * usd / mid + cost.usd.mid - machines for usd in (low, high))
        swings.append(Swing("price", cheap, dear, f"${low:.2f}/h", f"${high:.2f}/h"))
    skew = candidate.setup.skew
    if skew > 1.0:
        ends = (1.0, 2.0 * skew - 1.0)
        setups = [replace(candidate.setup, skew=end) for end in ends]
        steps = [one.step_s / candidate.step.step_s for one in calibration.predict(setups)]
        swings.append(Swing("skew", amount * steps[0], amount * steps[1], *(f"{end:.2f}" for end in ends)))
    return sorted(swings, key=lambda swing: swing.low - swing.high)
