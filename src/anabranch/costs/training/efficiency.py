"""What of the nominal speed a step reaches: one factor a component, fitted on measured runs.

step = ((device ^ q + host ^ q) ^ (1 / q)) (1 + bubble) family

device and host run beside each other, so the longer one decides (q = 3: a soft maximum). Factors multiply the seconds
of `Components`; traits of the software and the chip's family multiply in turn. Every factor has a prior, a guess with
its spread, so that a handful of runs does not turn it: maximum a posteriori in logarithms, with a soft-L1 loss since
published tables hold outliers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.columns import Column, Columns
from anabranch.costs.training.components import Components, components

SOFT_MAXIMUM = 3.0
MEASURED_SPREAD = 0.2  # of a measured step around the formula, in logarithms
HOST = ("launch", "moe_launch")
# name: (guess, spread of its logarithm). Components first: seconds needed over nominal seconds.
FACTORS = {
    "linear": (1.5, 0.5), "experts": (1.8, 0.5), "head": (1.6, 0.5), "attention": (1.6, 0.5),
    "stream": (1.0, 0.5), "units": (1.0, 0.5), "rows": (1.0, 0.5), "expert_weights": (1.0, 0.5),
    "logits": (1.0, 0.5), "optimizer": (1.0, 0.5), "tensor": (0.7, 0.5), "exchange": (1.0, 0.5),
    "data": (0.3, 0.5), "context": (0.5, 0.5), "pipeline": (0.3, 0.5), "step": (1.0, 0.5),
    "launch": (0.5, 0.5), "moe_launch": (1.0, 0.5), "bubble": (1.0, 0.15),
}  # fmt: skip
# Traits: by what they multiply the named components.
TRAITS = {
    "fp8_products": (1.2, 0.3), "fp4_products": (1.35, 0.3), "fp8_experts": (1.2, 0.3), "fp8_host": (1.2, 0.3),
    "overlap": (0.7, 0.4), "graphs": (0.7, 0.4), "async_tp": (0.7, 0.4),
}  # fmt: skip
FAMILY_SPREAD = 0.5


class Families(NamedTuple):
    """Of N setups: the chip's and the software's family, by which a whole step is multiplied."""

    chip: list[str]
    software: list[str]


class Efficiency(NamedTuple):
    """Fitted factors. chip, software: of a family; one that was not seen has 1, the mean of those that were."""

    factors: dict[str, float]
    chip: dict[str, float]
    software: dict[str, float]

    def step_s(self, columns: Columns, families: Families) -> Column:
        """Seconds of a step, N."""
        parts = components(columns)
        logs = np.log([self.factors[name] for name in (*FACTORS, *TRAITS)])
        family = [
            self.chip.get(chip, 1.0) * self.software.get(software, 1.0)
            for chip, software in zip(*families, strict=True)
        ]
        return step_of(self.parts_s(columns, parts), parts.bubble * np.exp(logs[_BUBBLE])) * np.array(family)

    def parts_s(self, columns: Columns, parts: Components | None = None) -> dict[str, Column]:
        """Seconds of each component with its factors, without bubble and family."""
        parts = parts or components(columns)
        return _scaled(np.log([self.factors[name] for name in (*FACTORS, *TRAITS)]), columns, parts)


_BUBBLE = list(FACTORS).index("bubble")


def step_of(seconds: dict[str, Column], bubble: Column) -> Column:
    """A step of its parts."""
    device = sum(part for name, part in seconds.items() if name not in HOST)
    host = sum(seconds[name] for name in HOST)
    return (device**SOFT_MAXIMUM + host**SOFT_MAXIMUM) ** (1.0 / SOFT_MAXIMUM) * (1.0 + bubble)


def _scaled(logs: NDArray[np.float64], columns: Columns, parts: Components) -> dict[str, Column]:
    at = dict(zip((*FACTORS, *TRAITS), logs, strict=True))
    has = columns.software
    products = at["fp8_products"] * has.fp8 + at["fp4_products"] * has.fp4
    host = at["fp8_host"] * (has.fp8 + has.fp4) + at["graphs"] * has.graphs
    more: dict[str, Column | float] = {
        "linear": products,
        "experts": products + at["fp8_experts"] * (has.fp8 + has.fp4),
        "tensor": at["async_tp"] * has.async_tp,
        "exchange": at["overlap"] * has.overlap,
        "launch": host,
        "moe_launch": host,
    }
    named = parts._asdict()
    return {
        name: named[name] * np.exp(at[name] + more.get(name, 0.0)) for name in FACTORS if name != "bubble"
    }


def fit_efficiency(
    columns: Columns, families: Families, measured_s: Column, weights: Column | None = None
) -> Efficiency:
    """From N measured steps. weights: of each, such as one over the repeats of its configuration."""
    from scipy.optimize import least_squares

    parts, target = components(columns), np.log(measured_s)
    chips, software = sorted(set(families.chip)), sorted(set(families.software))
    chip_at = np.array([chips.index(name) for name in families.chip])
    software_at = np.array([software.index(name) for name in families.software])
    prior = [*FACTORS.values(), *TRAITS.values()]
    guess = np.concatenate([np.log([g for g, _ in prior]), np.zeros(len(chips) + len(software))])
    spread = np.array([s for _, s in prior] + [FAMILY_SPREAD] * (len(chips) + len(software)))
    root = np.ones(len(target)) if weights is None else np.sqrt(weights)
    known = len(prior)

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        step = step_of(_scaled(logs[:known], columns, parts), parts.bubble * np.exp(logs[_BUBBLE]))
        family = logs[known : known + len(chips)][chip_at] + logs[known + len(chips) :][software_at]
        return np.concatenate(
            [root * (np.log(step) + family - target) / MEASURED_SPREAD, (logs - guess) / spread]
        )

    logs = least_squares(residuals, guess, loss="soft_l1").x
    factors = np.exp(logs)
    return Efficiency(
        dict(zip((*FACTORS, *TRAITS), factors[:known].tolist(), strict=True)),
        _named(chips, factors[known : known + len(chips)]),
        _named(software, factors[known + len(chips) :]),
    )


def _named(names: Sequence[str], factors: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(names, factors.tolist(), strict=True))
