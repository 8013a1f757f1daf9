"""What the front and the worker send each other, in lists of several. The front's None asks the worker to end."""

from typing import NamedTuple

from anabranch.scheduling.chain import End, Request
from anabranch.scheduling.tally import Tally


class Submit(NamedTuple):
    """Front to worker: compute this request."""

    id: int
    request: Request


class Cancel(NamedTuple):
    """Front to worker: nobody wants this chain any more."""

    id: int
    sample: int


class Ready(NamedTuple):
    """Worker to front, once: the model is loaded. why_not_native: why transformers' own modules compute it, if so.
    tokens: the most that one chain can have, prompt and new ones."""

    why_not_native: str | None
    tokens: int


class Failed(NamedTuple):
    """Worker to front: the model cannot be served."""

    message: str


class Refused(NamedTuple):
    """Worker to front: this request can never run."""

    id: int
    message: str


class Tokens(NamedTuple):
    """Worker to front: new tokens of a chain and their logprobs (None for forced ones); end where they are its last."""

    id: int
    sample: int
    tokens: list[int]
    logprobs: list[float | None]
    end: End | None


class Stats(NamedTuple):
    """Worker to front, now and then: chains, pages and counts. leaked: pages nobody holds, as checked at idle."""

    running: int
    waiting: int
    pages: int
    free: int
    cached: int
    leaked: int
    checks: int
    resident_bytes: int
    tally: Tally


Event = Ready | Failed | Refused | Tokens | Stats
