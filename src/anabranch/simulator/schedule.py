"""The order in which a pipeline stage runs its passes: 1F1B and interleaved 1F1B.

Narayanan et al. 2021 (arXiv:2104.04473, section 2.2): some forward passes to fill the pipeline, then one forward and
one backward in turn, then the backward passes that are left. With several chunks of layers a stage, micro-batches pass
each chunk in groups of as many as there are stages.
"""

from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one chunk of a stage's layers, forward or backward."""

    forward: bool
    chunk: int
    micro: int


def passes(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Pass]:
    """Of one stage. With several chunks `micro_batches` is a multiple of `stages` (`Layout.check`)."""
    total = chunks * micro_batches
    warm = (stages - stage - 1) * (1 if chunks == 1 else 2) + (chunks - 1) * stages
    warm = min(warm, total)
    forward = [Pass(True, *_place(k, stages, chunks)) for k in range(total)]
    backward = [
        Pass(False, chunks - 1 - chunk, micro)
        for chunk, micro in (_place(k, stages, chunks) for k in range(total))
    ]
    turns = zip(forward[warm:], backward, strict=False)
    return [*forward[:warm], *(one for turn in turns for one in turn), *backward[total - warm :]]


def _place(number: int, stages: int, chunks: int) -> tuple[int, int]:
    """Chunk and micro-batch of the `number`-th pass in one direction."""
    if chunks == 1:
        return 0, number
    group, inside = divmod(number, stages * chunks)
    return inside // stages, group * stages + inside % stages
