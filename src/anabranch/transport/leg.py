"""One de-duplicated exchange: a token travels once to each member of a group that takes some of its choices.

Shape suffixes: S tokens here, K choices a token, M members of the group, V (token, member) copies sent,
U tokens received, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.placement.base import IntArray
from anabranch.transport.codecs.base import Codec
from anabranch.transport.collectives import exchange_plain, gather_plain
from anabranch.transport.flight import Flight
from anabranch.transport.lanes import Lanes
from anabranch.transport.rows import fan_in
from anabranch.transport.segments import segment_index, starts


class Carried(NamedTuple):
    """Tokens (U, D) and their routing weights (U, K), zero for choices that are not this member's."""

    x_UD: Tensor
    weights_UK: Tensor


class Leg(NamedTuple):
    """Integer decisions of one exchange, for a range of tokens.

    token_V: token of each copy sent, member-major, counted from the range's first. keep_VK: the choices its
    receiver takes. send_M, recv_M: copies to and from each member. code_UK: the codes of the tokens received, -1
    for choices that are not this member's.
    """

    token_V: Tensor
    keep_VK: Tensor
    send_M: IntArray
    recv_M: IntArray
    code_UK: Tensor

    def out(
        self, x_SD: Tensor, weights_SK: Tensor, lanes: Lanes, codec: Codec | None
    ) -> Callable[[], Carried]:
        """Start sending tokens and weights; the landing returns what arrived."""
        sizes = (self.send_M.tolist(), self.recv_M.tolist())
        tokens, weights = Flight(lanes, *sizes, codec), Flight(lanes, *sizes)
        x_UD = tokens.depart(x_SD.index_select(0, self.token_V))
        weights_UK = weights.depart(weights_SK.index_select(0, self.token_V) * self.keep_VK)
        return lambda: Carried(tokens.arrive(x_UD), weights.arrive(weights_UK))

    def home(self, sums_UD: Tensor, tokens: int, lanes: Lanes, codec: Codec | None) -> Callable[[], Tensor]:
        """Start sending one row a token received back; the landing returns (S, D), S = `tokens`, their sums."""
        flight = Flight(lanes, self.recv_M.tolist(), self.send_M.tolist(), codec)
        pending_VD = flight.depart(sums_UD)
        return lambda: fan_in(flight.arrive(pending_VD), None, self.token_V, tokens)


def make_legs(
    member_SK: Tensor, code_SK: Tensor, bounds: Sequence[int], group: dist.ProcessGroup
) -> list[Leg]:
    """A leg for each range of tokens bounds[c]:bounds[c+1]. Collective; two small exchanges, whatever the ranges.

    member_SK: the member that takes each choice, -1 for none. code_SK: int32, what it is told of the choice.
    """
    members, chunks = dist.get_world_size(group), len(bounds) - 1
    hit_MS = torch.zeros((members + 1, member_SK.shape[0]), dtype=torch.bool, device=member_SK.device)
    hit_MS = hit_MS.scatter_(0, member_SK.T % (members + 1), True)[:members]  # -1 marks the row past the last
    member_V, token_V = hit_MS.nonzero(as_tuple=True)
    sizes_MC = torch.stack([part.sum(dim=1) for part in hit_MS.split(np.diff(bounds).tolist(), dim=1)], dim=1)
    sizes_MMC = gather_plain(sizes_MC, group).view(members, members, chunks).cpu().numpy()
    rank = dist.get_rank(group)
    send_MC, recv_MC = sizes_MMC[rank], sizes_MMC[:, rank]

    keep_VK = member_SK[token_V] == member_V.unsqueeze(-1)
    code_VK = torch.where(keep_VK, code_SK[token_V], -1)
    code_UK = exchange_plain(code_VK, send_MC.sum(axis=1).tolist(), recv_MC.sum(axis=1).tolist(), group)
    if chunks == 1:
        return [Leg(token_V, keep_VK, send_MC[:, 0], recv_MC[:, 0], code_UK)]
    legs = []
    for chunk in range(chunks):
        # Copies are member-major, and in token order within a member: a range is a stretch of each member's.
        sent_V, received_U = (_stretch(sizes, chunk, member_SK.device) for sizes in (send_MC, recv_MC))
        legs.append(
            Leg(
                token_V[sent_V] - bounds[chunk],
                keep_VK[sent_V],
                send_MC[:, chunk],
                recv_MC[:, chunk],
                code_UK[received_U],
            )
        )
    return legs


def _stretch(sizes_MC: IntArray, chunk: int, device: torch.device) -> Tensor:
    start_MC = starts(sizes_MC.ravel()).reshape(sizes_MC.shape)
    return segment_index(start_MC[:, chunk], sizes_MC[:, chunk], device)
