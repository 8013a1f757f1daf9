"""What the rows of the cluster benchmark say of `auto`: the verdict over the grid, and the tables for people."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class Verdict(NamedTuple):
    """What the grid says of `auto`. Ratios of step times; a cell is one lab and one workload.

    worst_vs_transformers, worst_vs_best_fixed: its time over theirs in the worst cell. median_speedup: over
    cells of max/mean >= 1.5. prediction_error: median of |predicted / measured - 1| over all rows predicted.
    int8_bytes_ratio: bytes between nodes of transformers' fp32 rows over those in int8, in the worst cell
    without guests.
    """

    cells: int
    worst_vs_transformers: float
    worst_vs_best_fixed: float
    skewed_cells: int
    median_speedup: float
    prediction_error: float
    int8_bytes_ratio: float

    def text(self) -> str:
        """For people."""
        return (
            f"{self.cells} cells: auto takes at most {self.worst_vs_transformers:.3f} of transformers' time and "
            f"{self.worst_vs_best_fixed:.3f} of the best fixed choice's; median speed-up {self.median_speedup:.2f} "
            f"over {self.skewed_cells} cells of max/mean >= 1.5; predictions err by {self.prediction_error:.1%} "
            f"in the median; rows in int8 move {self.int8_bytes_ratio:.1f} times fewer bytes between nodes than "
            f"transformers ({self.int8_bytes_ratio / 2:.1f} times, were its rows bf16)"
        )


def verdict(rows: Sequence[Row]) -> Verdict:
    """Over all cells of `rows`."""
    cells = _cells(rows)
    skewed = [c.auto["speedup_vs_transformers"] for c in cells if c.theirs["max_mean_before"] >= 1.5]
    errors = [
        abs(r["predicted_ms"] / r["step_ms_median"] - 1.0) for r in rows if r["predicted_ms"] is not None
    ]
    return Verdict(
        cells=len(cells),
        worst_vs_transformers=max(1.0 / c.auto["speedup_vs_transformers"] for c in cells),
        worst_vs_best_fixed=max(c.to_best for c in cells),
        skewed_cells=len(skewed),
        median_speedup=float(np.median(skewed)) if skewed else float("nan"),
        prediction_error=float(np.median(errors)),
        int8_bytes_ratio=min(
            (c.theirs["inter_bytes"] / c.int8_bytes for c in cells if c.int8_bytes), default=1.0
        ),
    )


def ratios_to_best(own_ms: Sequence[float], fixed_ms: Sequence[Sequence[float]]) -> np.ndarray:
    """auto's times over those of the best fixed choice, one for each round that `own_ms` has. Two at least.

    The best is chosen by the other half of the rounds than those it is compared in: the smallest of a dozen noisy
    medians is smaller than any of them truly is. Those measured in fewer rounds than auto were clearly slower.
    """
    own = np.array(own_ms)
    times = np.array([rounds for rounds in fixed_ms if len(rounds) == own.size])
    ratios: list[float] = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        others = np.delete(times, np.arange(own.size)[half], axis=1)
        best = int(np.median(others, axis=1).argmin())
        ratios += (own[half] / times[best][half]).tolist()
    return np.array(ratios)


def print_cells(rows: Sequence[Row]) -> None:
    """A line for each cell: how `auto` did beside transformers and beside the best fixed choice."""
    table = Table()
    for column in ("topology", "inter", "workload", "max/mean", "transformers ms", "auto ms", "predicted", "speed-up",
                   "of ideal", "best fixed", "auto / best", "chosen"):  # fmt: skip
        table.add_column(
            column, justify="left" if column in ("workload", "best fixed", "chosen") else "right"
        )
    for cell in _cells(rows):
        auto, best = cell.auto, cell.best
        table.add_row(
            auto["topology"], str(auto["inter_mbit"]), auto["workload"], f"{auto['max_mean_before']:.2f}",
            f"{cell.theirs['step_ms_median']:.0f}", f"{auto['step_ms_median']:.0f}", f"{auto['predicted_ms']:.0f}",
            f"{auto['speedup_vs_transformers']:.2f}", f"{auto['percent_of_ideal']:.0f} %",
            f"{best['policy']} {best['transport']}/{best['chunks']}", f"{cell.to_best:.2f}", auto["chosen"],
        )  # fmt: skip
    Console(width=None if os.isatty(1) else 200).print(table)


def print_explained(rows: Sequence[Row]) -> None:
    """One layer under natural routing: every candidate of `auto` with its predicted and measured time."""
    columns = ("topology", "inter_mbit", "planner", "exchange", "guests", "predicted_ms", "measured_ms")
    table = Table(
        *columns, title="one layer under natural routing, forward and backward: what auto chooses from"
    )
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=None if os.isatty(1) else 200).print(table)


class _Cell(NamedTuple):
    """One lab and one workload. best: the fastest fixed lossless row; to_best: auto's time over the best one's, the
    median of `ratios_to_best`.

    int8_bytes: between nodes, of the row in int8; 0 without one, and where guests' weights travelled besides.
    """

    auto: Row
    theirs: Row
    best: Row
    to_best: float
    int8_bytes: int


def _cells(rows: Sequence[Row]) -> list[_Cell]:
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["topology"], row["inter_mbit"], row["workload"]), []).append(row)
    return [_cell(found) for found in grouped.values()]


def _cell(rows: list[Row]) -> _Cell:
    (auto,), (theirs,) = ([r for r in rows if r["policy"] == name] for name in ("auto", "transformers"))
    fixed = [r for r in rows if r["policy"] not in ("auto", "ideal") and r["codec"] == "none"]
    best = min(fixed, key=lambda row: row["step_ms_median"])
    int8_bytes = sum(row["inter_bytes"] for row in rows if row["codec"] == "int8" and not row["guests"])
    to_best = ratios_to_best(auto["step_ms_rounds"], [row["step_ms_rounds"] for row in fixed])
    return _Cell(auto, theirs, best, float(np.median(to_best)), int8_bytes)
