"""Every figure behind an answer, with who says so, and what nobody has measured."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from anabranch.costs.energy import FLOOR, FULL
from anabranch.costs.training.calibration import Calibration
from anabranch.hardware.figure import Figure
from anabranch.planner.outcome import FAILURES, Outcome, Terms
from anabranch.planner.search import Request
from anabranch.simulator.goodput import NODE_MTBF_H


class Assumption(NamedTuple):
    """confidence: of `anabranch.hardware.figure`, "fitted", "simulated", "assumed" where it is a default of ours, or
    "request" where the user said it."""

    name: str
    value: str
    source: str
    confidence: str
    date: str = ""

    @classmethod
    def of(cls, name: str, figure: Figure) -> "Assumption":
        return cls(name, str(figure), figure.source, figure.confidence, figure.date)


def assumptions(
    found: Outcome, terms: Terms, calibration: Calibration, skew_origin: str, given: Collection[str]
) -> list[Assumption]:
    """given: settings of the request and the terms that the user chose."""
    return [
        *_asked(found.request, given),
        *_hardware(found.request),
        *_money(found, terms, given),
        *_fitted(found, calibration),
        _skew(found, skew_origin),
        *_rules(found, calibration),
    ]


def unmeasured(found: Outcome, calibration: Calibration) -> list[str]:
    """What the answer rests on without a measurement."""
    chip, cluster = found.request.cluster.chip.kind, found.request.cluster
    told = [
        f"nothing was measured on {cluster}: a run of your own, given to `anabranch calibrate`, narrows this"
    ]
    if not calibration.has_run(chip):
        told.append(
            f"no published run of this chip ({chip}): extrapolated; the intervals are of chips left out of the fit"
        )
    software = found.request.software.family
    if software not in calibration.efficiency.software:
        told.append(
            f"no published run of this software ({software}): taken as the mean of those that have one"
        )
    if found.request.by_train and not found.request.own_modules:
        told.append(
            f"what {found.request.shape.family}'s modules in transformers keep for backward is not known: memory is of "
            "fused kernels, which keep less"
        )
    if cluster.chip.kind != "cpu" and found.candidate.layout.etp > 1:
        told.append(
            "no published run divides experts over tensor-parallel ranks (etp): the formula alone tells"
        )
    told.append(
        "the fastest of many predictions tends to be an optimistic one; intervals are of any one prediction"
    )
    return [*told, *found.power.assumptions, *found.within90.owned.notes,
            "data loading, evaluation, checkpoints and start-up take no time"]  # fmt: skip


def _asked(request: Request, given: Collection[str]) -> list[Assumption]:
    values = {
        "tokens": f"{request.tokens:.4g}",
        "seq_len": f"{request.seq_len}",
        "global_batch": f"{request.global_batch} sequences, {request.global_batch * request.seq_len:,} tokens a step",
        "precision": request.precision,
    }
    return [
        Assumption(name, value, *(("yours", "request") if name in given else ("default", "assumed")))
        for name, value in values.items()
    ]


def _hardware(request: Request) -> list[Assumption]:
    chip, instance = request.cluster.chip, request.cluster.instance
    rows = [
        Assumption.of(f"{chip.kind}: {request.precision} peak", chip.peak_tflops(request.precision)),
        Assumption.of(f"{chip.kind}: memory", chip.memory_gib),
        Assumption.of(f"{chip.kind}: memory bandwidth", chip.memory_gb_per_s),
    ]
    for link in instance.scale_up:
        shape = f" {'x'.join(map(str, link.shape))}" if link.shape else ""
        rows.append(Assumption.of(f"link: {link.topology}{shape} of {link.chips} chips", link.gb_per_s))
    if request.cluster.nodes > 1 and instance.scale_out_gb_per_s:
        rows.append(Assumption.of("link: between nodes, a chip's share", instance.scale_out_gb_per_s))
    return rows


def _money(found: Outcome, terms: Terms, given: Collection[str]) -> list[Assumption]:
    cluster = found.request.cluster
    rows = [
        Assumption.of("power of all chips, at most", found.power.most_w),
        Assumption.of("power of all chips, idle", found.power.idle_w),
        Assumption.of("overhead of all nodes", found.power.overhead_w),
        Assumption.of("PUE", found.power.pue),
        Assumption("power while busy", f"{FLOOR:.0%} of the range, all of it from {FULL:.0%} of peak",
                   "costs/energy.py", "estimate"),
    ]  # fmt: skip
    if found.within90.usd is not None:
        basis = found.within90.owned.basis
        rows.append(Assumption.of(f"{basis} price of a node", cluster.instance.price(basis).usd_per_h))
    if terms.basis_of(cluster) == "owned":
        rows.append(Assumption.of("electricity", terms.usd_per_kwh))
    goodput = terms.goodput_of(cluster)
    stop_s, restart_s = FAILURES[1][1:]
    rows.append(Assumption(
        "goodput under failures", f"{goodput.mid:.4f} ({goodput.low:.4f} .. {goodput.high:.4f})",
        f"a node fails every {NODE_MTBF_H:,.0f} h, as in Llama 3 (arXiv:2407.21783); a checkpoint stops the run for "
        f"{stop_s:.0f} s, a restart takes {restart_s:.0f} s; ends: a third and three times that", "assumed",
    ))  # fmt: skip
    origin = ("yours", "request") if "utilisation" in given else ("default", "assumed")
    return [*rows, Assumption("hours of the run over paid hours", f"{terms.occupancy:g}", *origin)]


def _fitted(found: Outcome, calibration: Calibration) -> list[Assumption]:
    traits, software = calibration.residual.traits, found.request.software
    chips = ", ".join(np.unique(traits.chip).tolist())
    chip, efficiency = found.request.cluster.chip, calibration.efficiency
    seen = calibration.has_run(chip.kind)
    return [
        Assumption("step time", f"fitted on {len(traits.chip)} measured runs", f"chips {chips}", "fitted"),
        Assumption("interval", "of runs predicted unseen" if seen else "of runs predicted without their chip",
                   "split-conformal, costs/training/calibration.py", "fitted"),
        Assumption(f"factor of {chip.family} chips", f"{efficiency.chip.get(chip.family, 1.0):.2f}",
                   "measured runs" if chip.family in efficiency.chip else "none: the mean", "fitted"),
        Assumption(f"software {software.family}", f"{efficiency.software.get(software.family, 1.0):.2f}",
                   f"{software.dispatcher} exchange, {'with' if software.expert_overlap else 'without'} overlap",
                   "fitted" if software.family in efficiency.software else "assumed"),
        *(Assumption(f"factor of {name}", f"{factor:.2f}", "seconds needed over nominal seconds", "fitted")
          for name, factor in efficiency.factors.items()),
    ]  # fmt: skip


def _skew(found: Outcome, origin: str) -> Assumption:
    setup = found.candidate.setup
    return Assumption(
        f"skew at ep {setup.layout.ep}", f"{setup.skew:.2f} rows of the busiest rank over the mean", origin, "simulated"
    )  # fmt: skip


def _rules(found: Outcome, calibration: Calibration) -> list[Assumption]:
    reserve = found.request.reserve
    modules = "transformers' modules" if found.request.own_modules else "fused kernels"
    return [
        Assumption("memory", f"tensors of {modules}; {reserve:.0%} of a chip is left free", "costs/training/memory.py",
                   "assumed"),
        Assumption("memory, interval", f"of {len(calibration.memory_ratios)} measured configurations",
                   "split-conformal, costs/training/memory_error.py", "fitted"),
        Assumption("layouts", "within the bounds of the space", "planner/space.py", "assumed"),
    ]  # fmt: skip
