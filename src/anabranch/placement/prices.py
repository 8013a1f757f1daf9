"""The contract of prices: what a live choice may ask about time. Answered by `costs`, handed in from above."""

from typing import Protocol

from anabranch.placement.base import Plan
from anabranch.placement.choice import Exchange


class Prices(Protocol):
    """Every rank of a group holds equal prices, so that all choose alike."""

    def call_ms(self, plan: Plan, exchange: Exchange, planner: str) -> float:
        """Time of one call of the layer, forward and backward, with a plan that `planner` made."""
        ...

    def guest_rows(self, *, across_nodes: bool) -> int:
        """Rows whose computation takes as long as lending one guest, forward and backward: the break-even.

        across_nodes: whether the guest's host is on another node than its home.
        """
        ...
