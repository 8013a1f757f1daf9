"""Rows on their way between ranks: started at one point of the program, waited for at another.

What is computed between `depart` and `arrive` overlaps with the exchange. Autograd runs the graph in reverse,
so in backward the gradient's exchange starts where forward waited, and is waited for where forward started:
the overlap is mirrored without a line of code for it.

Shape suffixes: P rows sent, N rows received, D hidden size, W bytes of an encoded row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.transport.codecs.base import Codec
from anabranch.transport.lanes import Lanes


class _Underway(NamedTuple):
    """A started exchange. own: the rows a rank sends itself, which no codec touches; before: rows received
    from lower ranks, which come before them. sent is kept alive until the exchange is over."""

    works: tuple[Any, ...]
    sent: Tensor
    received: Tensor
    own: Tensor | None
    before: int


class Flight:
    """One exchange of rows between the ranks of `lanes`, and of their gradients the other way.

    send_R[d] rows go to rank d, recv_R[s] come from s. With a codec, rows that change ranks are encoded.
    """

    def __init__(
        self, lanes: Lanes, send_R: list[int], recv_R: list[int], codec: Codec | None = None
    ) -> None:
        self.lanes, self.send_R, self.recv_R, self.codec = lanes, send_R, recv_R, codec
        self.underway: _Underway | None = None

    def depart(self, rows_PD: Tensor) -> Tensor:
        """Start. Returns a tensor of the arriving shape that holds nothing yet; only `arrive` reads it."""
        return _Depart.apply(rows_PD, self)

    def arrive(self, pending_ND: Tensor) -> Tensor:
        """Wait. (N, D): the received rows, source-major."""
        return _Arrive.apply(pending_ND, self)

    def start(self, rows: Tensor, send_R: list[int], recv_R: list[int]) -> None:
        """Begin the exchange of `rows`; every rank does so in the same order."""
        assert self.underway is None, "one exchange at a time"
        rank = self.lanes.rank
        sent, own, before = rows.contiguous(), None, 0
        if self.codec is not None:
            low, own, high = rows.split([sum(send_R[:rank]), send_R[rank], sum(send_R[rank + 1 :])])
            sent = self.codec.encode(torch.cat([low, high]))
            send_R, recv_R, before = _without(rank, send_R), _without(rank, recv_R), sum(recv_R[:rank])
        received = sent.new_empty((sum(recv_R), *sent.shape[1:]))
        works = self.lanes.start(received, sent, recv_R, send_R)
        self.underway = _Underway(works, sent, received, own, before)

    def finish(self, hidden: int, dtype: torch.dtype) -> Tensor:
        """Wait for the exchange that was started; its rows."""
        underway = self.underway
        assert underway is not None, "nothing was started"
        self.underway = None
        for work in underway.works:
            work.wait()
        if self.codec is None or underway.own is None:
            return underway.received
        away = self.codec.decode(underway.received, hidden, dtype)
        low, high = away.tensor_split([underway.before])
        return torch.cat([low, underway.own, high])


def _without(rank: int, sizes_R: list[int]) -> list[int]:
    return [0 if r == rank else n for r, n in enumerate(sizes_R)]


def _hollow(like: Tensor, rows: int) -> Tensor:
    """A tensor of `rows` rows that takes the memory of one number."""
    return like.new_zeros(()).expand(rows, *like.shape[1:])


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, flight: Flight) -> Tensor:
        ctx.flight, ctx.hidden, ctx.dtype = flight, rows_PD.shape[-1], rows_PD.dtype
        flight.start(rows_PD, flight.send_R, flight.recv_R)
        return _hollow(rows_PD, sum(flight.recv_R))

    @staticmethod
    def backward(ctx: Any, _hollow_ND: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(ctx.hidden, ctx.dtype), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending_ND: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.finish(pending_ND.shape[-1], pending_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        flight: Flight = ctx.flight
        flight.start(grad_ND, flight.recv_R, flight.send_R)
        return _hollow(grad_ND, grad_ND.shape[0]), None
