"""Speculation without a draft model: a chain's next tokens are guessed from where its last ones stood before.

Prompt lookup (Saxena, 2023; as "n-gram speculation" in other engines): the longest recent match of the chain's last
tokens, in its prompt or in what it has generated, is continued. The step computes the guess's rows beside the
chain's next one; the sampler is applied to each in turn with the numbers it would have drawn anyway, and keeps what
agrees. So speculation changes how many tokens a step brings, never which.

Models with a multi-token-prediction head could guess by it; transformers leaves such heads out when it loads the
families served here, so there is none to ask.
"""

from collections.abc import Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np

from anabranch.scheduling.chain import Chain
from anabranch.scheduling.pages import PAGE

# The fewest tokens that make a match, how many earlier places are compared, and how far back each.
SHORTEST, PLACES, FARTHEST = 2, 8, 32
# Of a new observation in a moving average.
ACCEPTANCE_WEIGHT, TIME_WEIGHT = 0.1, 0.25
# Steps after which a measured time is forgotten, so that what it forbade is tried once more.
STALE = 512
# Every so many steps go without drafts, so that the price of a plain step stays known.
PLAIN_EVERY = 64


class Lookup:
    """Where each pair of a chain's tokens stood before: a list of places each, the latest first."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []  # by place: the place before it of the same pair, -1 for none

    def continued(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` guesses of what follows `tokens`: all of what was shown before, and more. Empty without a
        match; a match that runs into the end is repeated."""
        self._read(tokens)
        size = len(tokens)
        if size < SHORTEST:
            return []
        place = self._latest.get((tokens[-2], tokens[-1]), -1)
        best, longest = -1, SHORTEST - 1
        for _ in range(PLACES):
            if place < 0:
                break
            length = self._common(tokens, place)
            if length > longest:
                best, longest = place, length
            place = self._earlier[place]
        if best < 0:
            return []
        period = size - 1 - best
        return [tokens[best + 1 + i % period] for i in range(count)]

    def _read(self, tokens: Sequence[int]) -> None:
        """Note the pairs up to the last token but one: what follows them is known."""
        for place in range(len(self._earlier), len(tokens) - 1):
            pair = (tokens[place - 1], tokens[place]) if place else (-1, tokens[0])
            self._earlier.append(self._latest.get(pair, -1))
            self._latest[pair] = place

    @staticmethod
    def _common(tokens: Sequence[int], place: int) -> int:
        """How many tokens up to `place` equal the last ones."""
        last, length = len(tokens) - 1, 0
        while length < min(FARTHEST, place + 1) and tokens[place - length] == tokens[last - length]:
            length += 1
        return length


class StepTimes:
    """What steps of so many rows took: a moving average each, read off by interpolation.

    More rows than were ever measured are taken to cost what the most measured did, so that they are tried.
    """

    def __init__(self) -> None:
        self._measured: dict[int, tuple[float, int]] = {}
        self._steps = 0

    def tell(self, rows: int, ms: float) -> None:
        """One step of `rows` rows took `ms`."""
        self._steps += 1
        key = _rounded(rows)
        before, seen = self._measured.get(key, (ms, self._steps))
        if self._steps - seen >= STALE:
            before = ms
        self._measured[key] = (before + TIME_WEIGHT * (ms - before), self._steps)

    def reaches(self, rows: int) -> bool:
        """Whether a step of so many rows or fewer was measured: without, nothing tells what drafts would save."""
        most = _rounded(rows)
        return any(r <= most and self._steps - seen < STALE for r, (_, seen) in self._measured.items())

    def of(self, rows: Sequence[int]) -> list[float]:
        """Expected milliseconds of steps of so many rows each, never falling with rows. Something was measured."""
        known = sorted((r, ms) for r, (ms, seen) in self._measured.items() if self._steps - seen < STALE)
        at = [r for r, _ in known]
        return np.interp(rows, at, list(accumulate((ms for _, ms in known), max))).tolist()


class Speculator:
    """Drafts for the decoding chains of a step, as long as measured acceptance and measured step times make them pay.

    A guess is made for every chain at every step, drafted or not, and compared with what came: so the acceptance of
    a chain stays known at no cost while its drafts are off. Drafts are given to the likeliest guesses first, as many
    as bring the most expected tokens a millisecond.
    """

    def __init__(self, longest: int, within_page: bool) -> None:
        """longest: tokens of a draft at most. within_page: drafts end with the page of the chain's next token: where
        full pages are kept in another format, a guess after one would see it as it was written."""
        self.longest, self.within_page, self.times = longest, within_page, StepTimes()
        self._lookups: WeakKeyDictionary[Chain, Lookup] = WeakKeyDictionary()
        self._guesses: WeakKeyDictionary[Chain, list[int]] = WeakKeyDictionary()
        self._acceptance: WeakKeyDictionary[Chain, float] = WeakKeyDictionary()
        # Of all chains: what a new one begins with.
        self._usual = 0.5
        self._steps = 0

    def drafts(self, chains: Sequence[Chain], other_rows: int) -> dict[Chain, tuple[int, ...]]:
        """Guessed next tokens by chain; chains without one are left out. other_rows: prompt tokens in the step."""
        self._steps += 1
        # For each guessed token: the chance that it comes, its place in the draft, its chain.
        steps: list[tuple[float, int, Chain]] = []
        for chain in chains:
            lookup = self._lookups.setdefault(chain, Lookup())
            most = min(self.longest, chain.room - 1)
            if self.within_page:
                most = min(most, PAGE - 1 - chain.cached % PAGE)
            guess = self._guesses[chain] = lookup.continued(chain.tokens, most)
            chance = self._acceptance.setdefault(chain, self._usual)
            steps += [(chance ** (i + 1), i, chain) for i in range(len(guess))]
        plain_rows = len(chains) + other_rows
        if not steps or self._steps % PLAIN_EVERY == 0 or not self.times.reaches(plain_rows):
            return {}
        # A chain's tokens come in order: their chances only fall.
        steps.sort(key=lambda step: (-step[0], step[1]))
        expected = accumulate((chance for chance, _, _ in steps), initial=float(len(chains)))
        times = self.times.of([plain_rows + i for i in range(len(steps) + 1)])
        rates = [tokens / ms for tokens, ms in zip(expected, times, strict=True)]
        lengths: dict[Chain, int] = {}
        for _, _, chain in steps[: rates.index(max(rates))]:
            lengths[chain] = lengths.get(chain, 0) + 1
        return {chain: tuple(self._guesses[chain][:length]) for chain, length in lengths.items()}

    def came(self, chain: Chain, tokens: Sequence[int]) -> None:
        """The chain got these tokens after the last call of `drafts`."""
        for guessed, token in zip(self._guesses.pop(chain, ()), tokens, strict=False):
            hit = float(guessed == token)
            before = self._acceptance[chain]
            self._acceptance[chain] = before + ACCEPTANCE_WEIGHT * (hit - before)
            self._usual += ACCEPTANCE_WEIGHT * (hit - self._usual) / 8
            if not hit:
                break

    def acceptance(self, chain: Chain) -> float:
        """The moving average of its guessed tokens that came."""
        return self._acceptance.get(chain, self._usual)


def _rounded(rows: int) -> int:
    """Row counts measured together: exact up to 31, then sixteen to each doubling."""
    grain = max(1, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // grain) * grain
