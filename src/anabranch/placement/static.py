"""Static expert parallelism: every expert at home, always. What all others are compared with."""

from anabranch.placement.base import Homes, IntArray, Plan
from anabranch.placement.guests import identity
from anabranch.placement.load import load_of


class StaticPlanner:
    """The identity. Its cap is the fullest rank's load, since it never meant to do better."""

    name = "static"

    def plan(self, counts_RE: IntArray, homes: Homes) -> Plan:
        """counts_RE: int64 (R, E), rows rank r routes to expert e, non-negative."""
        load = load_of(counts_RE, homes)
        return identity(counts_RE, homes, load, cap=int(load.rank_rows_R.max()))

    def slots_needed(self, homes: Homes) -> int:
        """None."""
        return 0
