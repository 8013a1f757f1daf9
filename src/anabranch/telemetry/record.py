"""What one training step and one of its layers report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

EnergySource = Literal["rapl", "zeus", "neuron", "model", "estimate"]

# What stands behind a number of joules, to be read after "joules".
ENERGY_TOLD: Mapping[str, str] = {
    "rapl": "measured by RAPL",
    "zeus": "measured by the GPUs, through zeus",
    "neuron": "estimated from Neuron's power percentage",
    "model": "estimated from watts of a chip",
    "estimate": "estimated from CPU seconds",
}


class LayerRecord(NamedTuple):
    """Balance of one MoE layer in one step: of its rows, the fullest rank before and after planning.

    A row is one (token, expert) pair. Bytes are what crossed ranks, summed over them; token_bytes are
    activations, weight_bytes guests' weights and their gradients. fits: every rank stayed within the cap.
    """

    layer: int
    rows_before_max: int
    rows_after_max: int
    rows_mean: float
    guests: int
    token_bytes: int
    weight_bytes: int
    plan_ms: float
    fits: bool

    @property
    def max_mean_before(self) -> float:
        """Rank max/mean with every expert at home; 1.0 for no load at all."""
        return self.rows_before_max / self.rows_mean if self.rows_mean else 1.0

    @property
    def max_mean_after(self) -> float:
        """Rank max/mean as planned; 1.0 for no load at all."""
        return self.rows_after_max / self.rows_mean if self.rows_mean else 1.0


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of the whole run: all ranks, layers and micro-batches of it.

    max_mean_before and max_mean_after are rank max/mean, averaged over layers and micro-batches; guests,
    bytes and plan_ms are sums. joules is what the step used, and energy_source who says so (`ENERGY_TOLD`). eval_loss
    is None but after an evaluation.
    """

    step: int
    loss: float
    tokens: int
    step_ms: float
    tokens_per_s: float
    max_mean_before: float
    max_mean_after: float
    guests: int
    token_bytes: int
    weight_bytes: int
    plan_ms: float
    joules: float
    energy_source: EnergySource
    learning_rate: float
    grad_norm: float
    eval_loss: float | None = None

    @property
    def joules_per_token(self) -> float:
        """Of the trained tokens."""
        return self.joules / self.tokens if self.tokens else 0.0
