"""Voting over the samples of one prompt, which may end before all have answered."""

from collections import Counter
from dataclasses import dataclass, field
from math import comb

from anabranch.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """answer: what most samples gave, of equals the one by the lowest sample; None where none gave any.

    saved_tokens is an estimate: each cancelled sample is taken to have had the mean length of those that finished,
    and what it had already generated is subtracted (down to 0). Long chains finish last, so it is rather too low.
    """

    answer: str | None
    counts: dict[str, int]
    finished: int
    cancelled: int
    saved_tokens: float


@dataclass
class Ballot:
    """Answers of one prompt's samples as they finish.

    The vote is decided once the leader cannot be overtaken by the samples that still run: the answer is then that of
    all samples. With `confidence` below 1 it is also decided once the leader is the more frequent of the first two
    with that probability, by Adaptive-Consistency's Beta criterion (Aggarwal et al., 2023, arXiv:2305.11860); the
    answer may then differ, the more so as short chains vote first. Raises ConfigError for a setting out of range.
    """

    samples: int
    confidence: float = 1.0
    votes: dict[int, str | None] = field(default_factory=dict[int, str | None])
    _tokens: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"must be at least 1, not {self.samples}", setting="samples")
        if not 0.5 < self.confidence <= 1:
            raise ConfigError(f"must lie in (0.5, 1], not {self.confidence}", setting="vote_confidence")

    def cast(self, sample: int, answer: str | None, tokens: int) -> None:
        """A finished sample's answer, None where it gave none, and its new tokens."""
        assert sample not in self.votes and len(self.votes) < self.samples
        self.votes[sample] = answer
        self._tokens += tokens

    @property
    def decided(self) -> bool:
        """Whether the samples that still run can be cancelled."""
        first, second = self._leaders()
        running = self.samples - len(self.votes)
        if running == 0 or first - second > running:
            return True
        return self.confidence < 1 and beta_confidence(first, second) >= self.confidence

    def outcome(self, cancelled: dict[int, int]) -> Outcome:
        """The result; cancelled: new tokens that each cancelled sample had by then."""
        mean = self._tokens / max(len(self.votes), 1)
        return Outcome(
            self._winner(), dict(self._counts()), len(self.votes), len(cancelled),
            sum(max(mean - had, 0.0) for had in cancelled.values()),
        )  # fmt: skip

    def _counts(self) -> Counter[str]:
        """Votes by answer, answers in the order of samples."""
        return Counter(answer for _, answer in sorted(self.votes.items()) if answer is not None)

    def _leaders(self) -> tuple[int, int]:
        first, second, *_ = sorted([*self._counts().values(), 0, 0], reverse=True)
        return first, second

    def _winner(self) -> str | None:
        counts = self._counts()
        return max(counts, key=lambda answer: counts[answer], default=None)


def beta_confidence(first: int, second: int) -> float:
    """Probability that the first of two answers is the more frequent one, after so many votes for each.

    With a uniform prior its share is Beta(first + 1, second + 1), which is above 1/2 as probably as `n` fair coins
    show at most `first` heads, n = first + second + 1.
    """
    n = first + second + 1
    return sum(comb(n, heads) for heads in range(first + 1)) / 2**n
