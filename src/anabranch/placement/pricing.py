"""Where prices come from: the protocol by which the torch half asks for what the other half fits.

The object behind it is handed in by the package's `__init__` or by `cli`, the two places that see both halves.
"""

from typing import Protocol

from anabranch.placement.prices import Prices
from anabranch.telemetry.samples import Samples


class Pricing(Protocol):
    """Remembers measurements between runs, and turns them into prices."""

    def load(self, key: str) -> Samples | None:
        """What was stored for exactly this key; None where nothing was."""
        ...

    def store(self, key: str, samples: Samples) -> None:
        """Keep for the next run."""
        ...

    def prices(self, samples: Samples) -> Prices:
        """What calls cost on the machine that was measured."""
        ...
