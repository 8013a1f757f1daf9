"""What one launch of the cluster benchmark is told."""

from dataclasses import dataclass
from typing import Any

from anabranch.cli.cluster_cases import ClusterCases


@dataclass(frozen=True)
class ClusterBench:
    """What one launch measures.

    model: the folder of its initial weights. rounds: the most of one cell. folder: where each cell's rows are put down
    as a file `cell-*.json`, and what was calibrated. cpu: each rank's quota, None without.
    """

    model: str
    cases: ClusterCases
    workloads: list[str]
    rounds: int
    slots: int
    epsilon: float
    explain: bool
    folder: str
    cpu: float | None = None

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "ClusterBench":
        return cls(**{**settings, "cases": ClusterCases(**settings["cases"])})
