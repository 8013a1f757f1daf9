"""What a scheduler has counted."""

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts since the start. reused: prompt tokens found in the prefix tree or copied from another sample. kept:
    preempted chains whose pages went to a tier. fetched: of these, those that came back. evicted: tokens whose pages
    left a chain. cancelled: chains that were running. drafted, accepted: guessed tokens."""

    steps: int = 0
    preempted: int = 0
    kept: int = 0
    fetched: int = 0
    evicted: int = 0
    cancelled: int = 0
    reused: int = 0
    prefilled: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
