"""Prices from measurement: the calibrated answer to the questions of `placement`."""

from anabranch.costs.call import CallModel
from anabranch.placement.base import Plan
from anabranch.placement.choice import Exchange
from anabranch.telemetry.samples import Samples


class CalibratedPrices:
    """Answers `placement.prices.Prices` by what was measured. Raises ConfigError as `CallModel` does."""

    def __init__(self, samples: Samples) -> None:
        self.model = CallModel(samples)

    def call_ms(self, plan: Plan, exchange: Exchange, planner: str) -> float:
        """Time of one call of the layer, forward and backward, with a plan that `planner` made."""
        return self.model.cost(plan, exchange, planner).total_ms

    def guest_rows(self, *, across_nodes: bool) -> int:
        """Rows whose computation takes as long as lending one guest, with nobody else lending at the time."""
        return self.model.rows_worth_ms(self.model.lend_ms(across_nodes=across_nodes))
