"""Where pages of preempted chains go instead of being computed once more: a contract that serving/ fulfils."""

from typing import Protocol

from anabranch.scheduling.chain import Chain


class Tier(Protocol):
    """Keeps copies of chains' pages outside the pool."""

    def keep(self, chain: Chain) -> bool:
        """Copy the pages of a running chain that is about to lose them; False where there is no room."""
        ...

    def fetch(self, chain: Chain, first: int) -> bool:
        """Write the copies into the chain's pages from number `first` on, and forget them. False where they are
        lost: the chain then computes them once more."""
        ...

    def drop(self, chain: Chain) -> None:
        """Forget the copies of a chain that has ended."""
        ...
