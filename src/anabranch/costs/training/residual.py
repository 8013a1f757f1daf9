"""What the formula leaves over, learned from alike setups: a Gaussian process on log(measured / formula).

Rasmussen and Williams 2006, chapters 2 and 5. The kernel is a sum: same source, same software, same chip, ... and
products of those with nearness of layouts and shapes. Its amplitudes are learned by marginal likelihood, under a
log-normal prior each. Setups unlike all measured ones get back the formula and a wide spread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.traits import Traits

AMPLITUDE = (-4.5, 2.0)  # of a term's variance: mean and spread of its logarithm; 0.011 is a residual of 11 %
NOISE = (-7.0, 1.0)
ITERATIONS = 40

Matrix = NDArray[np.float64]


class Spread(NamedTuple):
    """Of a logarithm: mean and standard deviation, N each."""

    mean: Matrix
    deviation: Matrix


class Residual(NamedTuple):
    """A fitted process. amplitudes: variances of the terms. group: of a configuration, alike for its repeats.
    noise: of one measurement. weights: K^-1 times the residuals. inverse: K^-1, for the deviation."""

    traits: Traits
    amplitudes: Matrix
    group: float
    noise: float
    weights: Matrix
    inverse: Matrix

    def at(self, traits: Traits) -> Spread:
        """The residual expected at other setups, and how uncertain a new measurement there is."""
        cross = np.tensordot(self.amplitudes, terms(traits, self.traits), 1)
        # With itself a setup has 1 in every term but the last, which grows with its switches.
        own = self.amplitudes[:-1].sum() + self.amplitudes[-1] * (traits.switches_NC**2).sum(axis=1)
        # A new setup is of no known configuration: the variance of one is noise to it.
        noise = self.noise + self.group
        variance = own + noise - np.einsum("ij,jk,ik->i", cross, self.inverse, cross)
        return Spread(cross @ self.weights, np.sqrt(np.maximum(variance, noise)))


def terms(left: Traits, right: Traits) -> Matrix:
    """The kernel's terms between two sets of setups, (terms, left, right)."""
    source, software, chip, precision = (
        (getattr(left, name)[:, None] == getattr(right, name)[None]).astype(float)
        for name in ("source", "software", "chip", "precision")
    )
    layout = _near(left.layout_NA, right.layout_NA)
    shape = _near(left.shape_NB, right.shape_NB)
    switches = _near(left.switches_NC, right.switches_NC)
    shared = left.switches_NC @ right.switches_NC.T
    return np.stack([
        source, software, shape, chip, precision, chip * precision, source * chip, source * shape,
        layout, layout * source, layout * source * shape * chip, shape * chip,
        layout * source * shape * chip * precision * switches, shape * chip * precision * source,
        switches * layout, shared,
    ])  # fmt: skip


def _near(left_ND: Matrix, right_ND: Matrix) -> Matrix:
    return np.exp(-0.5 * ((left_ND[:, None] - right_ND[None]) ** 2).sum(-1))


def fit_residual(traits: Traits, residuals: Matrix, groups: NDArray[np.str_]) -> Residual:
    """groups: rows of one configuration share a term of their own, so that repeats count as one measurement."""
    from scipy.linalg import solve_triangular
    from scipy.optimize import minimize

    parts = np.concatenate([terms(traits, traits), (groups[:, None] == groups[None])[None].astype(float)])
    size, count = len(residuals), len(parts)
    means = np.array([AMPLITUDE[0]] * count + [NOISE[0]])
    spreads = np.array([AMPLITUDE[1]] * count + [NOISE[1]])

    def loss(logs: Matrix) -> tuple[float, Matrix]:
        scales = np.exp(logs)
        kernel: Matrix = np.tensordot(scales[:-1], parts, 1) + scales[-1] * np.eye(size)
        root = np.asarray(np.linalg.cholesky(kernel), dtype=np.float64)
        half: Matrix = solve_triangular(root, np.eye(size), lower=True)
        inverse: Matrix = half.T @ half
        alpha: Matrix = inverse @ residuals
        slope: Matrix = 0.5 * (inverse - np.outer(alpha, alpha))
        gradient = np.append(np.tensordot(parts, slope, 2), np.trace(slope)) * scales
        offset = (logs - means) / spreads
        value: float = 0.5 * residuals @ alpha + np.log(np.diag(root)).sum() + 0.5 * offset @ offset
        return float(value), gradient + offset / spreads

    found = minimize(loss, means, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    scales = np.exp(found.x)
    return residual_of(traits, residuals, groups, scales[:-2], float(scales[-2]), float(scales[-1]))


def residual_of(
    traits: Traits,
    residuals: Matrix,
    groups: NDArray[np.str_],
    amplitudes: Matrix,
    group: float,
    noise: float,
) -> Residual:
    """The process of known variances, given what was measured."""
    same = (groups[:, None] == groups[None]).astype(float)
    kernel = (
        np.tensordot(amplitudes, terms(traits, traits), 1) + group * same + noise * np.eye(len(residuals))
    )
    inverse = np.asarray(np.linalg.solve(kernel, np.eye(len(residuals))), dtype=np.float64)
    return Residual(traits, amplitudes, group, noise, inverse @ residuals, inverse)
