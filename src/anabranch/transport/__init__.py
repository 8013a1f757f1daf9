"""Exchange patterns: how rows reach the rank that computes them, and come back."""

from anabranch.transport.base import Route, Seats, Slots, Transport, Wires
from anabranch.transport.choose import TRANSPORTS, make_transport
from anabranch.transport.domain import Domain, make_domain

__all__ = [
    "TRANSPORTS",
    "Domain",
    "Route",
    "Seats",
    "Slots",
    "Transport",
    "Wires",
    "make_domain",
    "make_transport",
]
