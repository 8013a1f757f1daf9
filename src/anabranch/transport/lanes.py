"""The two directions of an exchange.

Shape suffixes: M ranks of the groups.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Lanes(NamedTuple):
    """One set of ranks, in one group or two: rows for higher ranks travel in `up`, rows for lower ones in `down`.

    Where both are the same group an exchange is one collective. gloo serves a pair of ranks half-duplex within a
    group: on slow links two groups, each used in one direction only, deliver nearly twice as much. Overlapping
    exchanges keep to it, whichever way they go.
    """

    up: dist.ProcessGroup
    down: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """This rank's place."""
        return dist.get_rank(self.up)

    @property
    def members(self) -> int:
        """M."""
        return dist.get_world_size(self.up)

    def start(self, received: Tensor, sent: Tensor, recv_M: list[int], send_M: list[int]) -> tuple[Any, ...]:
        """Begin to exchange rows: send_M[d] go to rank d, recv_M[s] come from s. Works to wait for."""
        if self.up is self.down:
            return (_start(self.up, received, sent, recv_M, send_M),)
        here = self.rank
        # Rows are ordered by rank on both sides: each direction is one stretch. What stays goes up.
        lower, upto = sum(send_M[:here]), sum(recv_M[: here + 1])
        none_below, none_above = [0] * here, [0] * (self.members - here)
        rising = _start(
            self.up,
            received[:upto],
            sent[lower:],
            recv_M[: here + 1] + none_above[1:],
            none_below + send_M[here:],
        )
        falling = _start(
            self.down,
            received[upto:],
            sent[:lower],
            [*none_below, 0, *recv_M[here + 1 :]],
            send_M[:here] + none_above,
        )
        return rising, falling


def _start(
    group: dist.ProcessGroup, received: Tensor, sent: Tensor, recv_M: list[int], send_M: list[int]
) -> Any:
    return dist.all_to_all_single(received, sent, recv_M, send_M, group=group, async_op=True)
