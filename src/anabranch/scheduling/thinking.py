"""When thinking stops: a budget of tokens, after which the end of thought is forced into the chain."""

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.errors import ConfigError


@dataclass(frozen=True)
class Thinking:
    """Budget of one request's thought (as "budget forcing" of Muennighoff et al., 2025, arXiv:2501.19393).

    A chain whose first `budget` new tokens do not hold `end` gets `closing` and `end` appended, unsampled, and goes
    on from there. Raises ConfigError naming the setting that cannot work.
    """

    budget: int
    # The tokens that end a thought, such as those of "</think>".
    end: tuple[int, ...]
    # Words put before a forced end, so that it does not break a sentence off.
    closing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ConfigError(f"must be 0 or above, not {self.budget}", setting="thinking_budget")
        if not self.end:
            raise ConfigError("must hold at least one token", setting="end_of_thought")

    def forced(self, new: Sequence[int]) -> tuple[int, ...]:
        """What follows these new tokens, which spend the budget: nothing where they hold an end of thought.

        An end that has just begun is completed.
        """
        if _holds(new, self.end):
            return ()
        begun = next((n for n in range(len(self.end) - 1, 0, -1) if tuple(new[-n:]) == self.end[:n]), 0)
        return self.end[begun:] if begun else self.closing + self.end


def _holds(tokens: Sequence[int], part: tuple[int, ...]) -> bool:
    last = len(tokens) - len(part)
    return any(tuple(tokens[i : i + len(part)]) == part for i in range(last + 1))
