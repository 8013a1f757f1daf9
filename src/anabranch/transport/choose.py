"""The registry of transports."""

import difflib

from anabranch.errors import ConfigError
from anabranch.placement.choice import Exchange
from anabranch.placement.nodes import Nodes
from anabranch.transport.all_gather import AllGather
from anabranch.transport.all_to_all import AllToAll
from anabranch.transport.base import Transport, Wires
from anabranch.transport.dedup import Dedup
from anabranch.transport.domain import Domain
from anabranch.transport.two_level import TwoLevel

TRANSPORTS: dict[str, type[Transport]] = {cls.name: cls for cls in (AllToAll, Dedup, TwoLevel, AllGather)}

OVERLAPPING = ("dedup", "two_level")
"""Transports that can send a micro-batch in several pieces."""


def candidate_exchanges(nodes: Nodes) -> tuple[Exchange, ...]:
    """What `auto` chooses from on these nodes. Codecs lose precision and are never its choice; `all_gather` has
    buffers of fixed size, which only pay where shapes must be static."""
    if nodes.ranks == 1:
        return (Exchange("all_to_all"),)
    levels = ("dedup", "two_level") if nodes.regular and 1 < nodes.count < nodes.ranks else ("dedup",)
    return (Exchange("all_to_all"), *(Exchange(level, chunks) for level in levels for chunks in (1, 2)))


def require_transport(name: str, *others: str) -> None:
    """Raise ConfigError unless `name` is a registered transport, or one of `others`."""
    names = [*others, *TRANSPORTS]
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name!r} is not one of {', '.join(names)}.{hint}", setting="transport")


def make_transport(name: str, domain: Domain, wires: Wires = Wires()) -> Transport:  # noqa: B008 - frozen
    """Build the named transport for `domain`. Raises ConfigError for an unknown name."""
    require_transport(name)
    return TRANSPORTS[name](domain, wires)
