"""What a step takes and gives, whoever computes it.

Shape suffixes: T rows of the step, W wanted rows, C chains, P pages of a chain, V vocabulary, L layers with experts,
K experts a token.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.serving.step.draw import Draw

Int32 = NDArray[np.int32]


class Rows(NamedTuple):
    """The tokens of one step, a row each; rows of a chain are in order.

    position_T: of the rotary embedding. length_T: cached tokens that the row attends to, itself the last.
    chain_T: the row's line of table_CP, which holds page numbers. want_W: rows whose logits are wanted.
    one_each: no two rows are of one chain.
    """

    token_T: Int32
    position_T: Int32
    length_T: Int32
    chain_T: Int32
    table_CP: Int32
    want_W: Int32
    one_each: bool


class Outputs(NamedTuple):
    """logits_WV: fp32. best_W: the most probable token. log_total_W: log of the sum of exponentials of the logits,
    so that logits - log_total are log-probabilities. Only where asked for, routed_LTK: each row's experts; mass_TP:
    each row's attention by page of its chain, summed over layers and heads. Valid until the next step."""

    logits_WV: Tensor
    best_W: Int32
    log_total_W: NDArray[np.float32]
    routed_LTK: Int32 | None = None
    mass_TP: NDArray[np.float32] | None = None


class Step(Protocol):
    """Runs rows through a model, reading and extending the pages of their chains.

    routing: whether outputs tell the experts of each row; the caller's to set.
    """

    name: str
    vocab: int
    routing: bool

    def run(self, rows: Rows) -> Outputs:
        """Logits of the wanted rows; keys and values of all rows are cached when it returns."""
        ...

    def draw(self, logits_WV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """A token for each draw from the logits of the last `run`."""
        ...

    def close(self) -> None:
        """Give threads and memory back; `run` is over."""
        ...
