"""Exchange patterns: how rows reach the rank that computes them, and come back."""

from anabranch.transport.base import Route, Seats, Slots, Transport
from anabranch.transport.choose import TRANSPORTS, make_transport

__all__ = ["TRANSPORTS", "Route", "Seats", "Slots", "Transport", "make_transport"]
