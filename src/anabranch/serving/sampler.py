"""The next token of each chain from its logits.

A chain's random numbers depend on its seed, its sample and its position only: not on the batch, the step or a
preemption.
"""

from collections.abc import Iterable

from anabranch.scheduling.scheduler import Part
from anabranch.serving.step.base import Outputs, Step
from anabranch.serving.step.draw import Draw

MASK64 = (1 << 64) - 1


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) of these three, by SplitMix64's mixing function (Steele et al., OOPSLA 2014)."""
    state = 0
    for part in (seed, sample, position):
        state = _mix((state + part + 0x9E3779B97F4A7C15) & MASK64)
    return (state >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def sample(outputs: Outputs, parts: Iterable[Part], step: Step) -> list[list[int]]:
    """The tokens that each part with wanted logits gets: those of its draft that are also drawn, and the one after.

    Rows of a part follow each other, as its guesses do.
    """
    wanted = [part for part in parts if part.last]
    tokens, draws, row = outputs.best_W.tolist(), list[Draw](), 0
    for part in wanted:
        guesses = len(part.draft)
        if not part.chain.plain:
            draws += [_draw(row + i, part, i) for i in range(1 + guesses)]
        row += 1 + guesses
    if draws:
        for draw, token in zip(draws, step.draw(outputs.logits_WV, draws), strict=True):
            tokens[draw.row] = token
    if len(tokens) == len(wanted):
        return [[token] for token in tokens]
    found: list[list[int]] = []
    row = 0
    for part in wanted:
        agreed = 0
        while agreed < len(part.draft) and tokens[row + agreed] == part.draft[agreed]:
            agreed += 1
        found.append(tokens[row : row + agreed + 1])
        row += 1 + len(part.draft)
    return found


def _draw(row: int, part: Part, guessed: int) -> Draw:
    """After the chain's tokens and so many guesses. Guesses that turn out wrong leave the draws after them unused."""
    chain, sampling = part.chain, part.chain.request.sampling
    seen = ()
    if sampling.repetition_penalty != 1.0:
        seen = sorted({*chain.tokens, *part.draft[:guessed]})
    return Draw(row, sampling, uniform(sampling.seed, chain.sample, len(chain.tokens) + guessed), seen)
