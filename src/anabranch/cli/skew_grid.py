"""`anabranch bench skew`, the launching side: labs one after the other, and what their rows say of the simulator."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.cluster_cases import NATURAL
from anabranch.cli.cluster_grid import (
    MODEL,
    USUAL_RANKS,
    cases_of_model,
    full_grid,
    in_lab,
    topology,
    write_model,
)
from anabranch.cli.cluster_settings import ClusterBench
from anabranch.cli.device import quiet
from anabranch.cli.fail import fails_clearly
from anabranch.cli.process import usable_cores
from anabranch.cli.results import require_json_file, write_results
from anabranch.errors import ConfigError
from anabranch.workload.trace import natural_trace

# Rotating and bursting loads (W6, W7) have no histogram that holds; W0 is the balanced step itself.
WORKLOADS = [NATURAL, "W1", "W2", "W3", "W5"]
QUICK = [NATURAL, "W2"]
MAX_MEAN = 2.0  # of ranks, where the workload can have it
# Two policies differ where their times do by more than this, and by more than so many standard errors.
APART, SURE = 0.01, 2.0
Row = dict[str, Any]


JsonFile = Annotated[Path | None, typer.Option("--json", help="write {machine, rows, verdict} to this file")]
Quick = Annotated[bool, typer.Option("--quick", help="one lab, two workloads: under 5 minutes")]
Rounds = Annotated[int, typer.Option(min=3, help="measured rounds of every policy")]
Tokens = Annotated[int, typer.Option(min=64, help="tokens a rank")]
Workloads = Annotated[
    list[str] | None, typer.Option("--workload", help=f"only this one of {', '.join(WORKLOADS)}; repeatable")
]
Only = Annotated[list[str] | None, typer.Option("--topology", help="only this one, such as 2x2; repeatable")]


@fails_clearly
def skew(
    json_file: JsonFile = None, quick: Quick = False, rounds: Rounds = 15, tokens: Tokens = 256, only: Only = None,
    workload: Workloads = None,
) -> None:  # fmt: skip
    """What natural skew costs a step: measured on emulated nodes, and predicted from a histogram; as root."""
    require_json_file(json_file)
    quiet()
    grid = full_grid(usable_cores()).only(only or ["2x2", "4x1"])
    labs, workloads = (grid.labs[1:2], QUICK) if quick else (grid.labs, WORKLOADS)
    workloads = _chosen(workload) if workload else workloads
    cases, rows = cases_of_model(tokens, MAX_MEAN, natural_trace(MODEL)), list[Row]()
    with tempfile.TemporaryDirectory(prefix="anabranch-skew-") as name:
        model = Path(name) / "model"
        write_model(model)
        for number, spec in enumerate(labs):
            own, folder = tokens * USUAL_RANKS // max(USUAL_RANKS, spec.ranks), Path(name) / str(number)
            here = replace(cases, ranks=spec.ranks, tokens=own)
            bench = ClusterBench(str(model), here, workloads, rounds, 4, 0.05, False, str(folder), spec.cpu)
            about = {"topology": topology(spec), "inter_mbit": spec.inter_mbit, "tokens": own}
            cells = list[Row]()
            in_lab("bench_skew", spec, folder, bench, cells.extend)
            more = [about | row for row in cells]
            rows += more
            _show(more)
            # After each lab: an interruption keeps what was measured.
            found = verdict(rows)._asdict()
            write_results(json_file, rows, {"model": MODEL, "rounds": rounds}, verdict=found)
    typer.echo(verdict(rows).text())


def _chosen(names: Sequence[str]) -> list[str]:
    """Raises ConfigError for a workload that is not measured here."""
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise ConfigError(
            f"{unknown[0]!r} is not measured; choose of {', '.join(WORKLOADS)}", setting="workload"
        )
    return list(dict.fromkeys(names))


class Verdict(NamedTuple):
    """What the rows say of the simulator. A cell is one lab and one workload.

    worst_error_points, median_error_points: predicted less measured throughput over balanced, in percent of balanced,
    over all rows; natural_error_points: the worst under the natural trace. ranked_alike: cells in which every pair of
    policies that differs measurably is predicted in the measured order; open_pairs: those that do not differ.
    ranked_exactly: cells in which the order of medians is the predicted one, close or not.
    """

    cells: int
    worst_error_points: float
    median_error_points: float
    natural_error_points: float
    ranked_alike: int
    ranked_exactly: int
    pairs: int
    open_pairs: int

    def text(self) -> str:
        """For people."""
        return (
            f"{self.cells} cells: natural over balanced throughput is predicted within {self.worst_error_points:.1f} "
            f"points (median {self.median_error_points:.1f}, natural routing {self.natural_error_points:.1f}); "
            f"policies are ranked as measured in {self.ranked_alike} of {self.cells} cells, {self.open_pairs} of "
            f"{self.pairs} pairs being too close to tell, and in {self.ranked_exactly} with those as well"
        )


def verdict(rows: Sequence[Row]) -> Verdict:
    """Over all cells of `rows`."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["topology"], row["inter_mbit"], row["workload"]), []).append(row)
    orders = [[_order(*pair) for pair in combinations(cell, 2)] for cell in cells.values()]
    errors = np.abs([row["error_points"] for row in rows])
    natural = [abs(row["error_points"]) for row in rows if row["workload"] == NATURAL]
    return Verdict(
        cells=len(cells),
        worst_error_points=float(errors.max()),
        median_error_points=float(np.median(errors)),
        natural_error_points=max(natural, default=float("nan")),
        ranked_alike=sum(False not in found for found in orders),
        ranked_exactly=sum(
            _ranked(cell, "step_ms_median") == _ranked(cell, "predicted_ms") for cell in cells.values()
        ),
        pairs=sum(len(found) for found in orders),
        open_pairs=sum(found.count(None) for found in orders),
    )


def _ranked(cell: list[Row], by: str) -> list[str]:
    return [row["policy"] for row in sorted(cell, key=lambda row: row[by])]


def _order(one: Row, other: Row) -> bool | None:
    """Whether two policies are predicted in the order that was measured; None where they do not differ measurably.

    Rounds are compared with themselves: what else the machine did then hit both."""
    ratios = np.log(np.array(one["step_ms_rounds"]) / np.array(other["step_ms_rounds"]))
    middle = float(np.median(ratios))
    # The median's standard error is about 1.25 of the mean's.
    error = 1.25 * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    if abs(middle) <= max(APART, SURE * error):
        return None
    return (one["predicted_ms"] > other["predicted_ms"]) == (middle > 0)


def _show(rows: Sequence[Row]) -> None:
    table = Table()
    for column in ("topology", "inter", "workload", "policy", "max/mean", "predicted", "balanced ms", "step ms",
                   "of balanced", "predicted", "points"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("workload", "policy") else "right")
    for row in rows:
        table.add_row(
            row["topology"], str(row["inter_mbit"]), row["workload"], row["policy"], f"{row['max_mean']:.2f}",
            f"{row['predicted_max_mean']:.2f}", f"{row['balanced_ms_median']:.0f}", f"{row['step_ms_median']:.0f}",
            f"{row['throughput']:.1%}", f"{row['predicted_throughput']:.1%}", f"{row['error_points']:+.1f}",
        )  # fmt: skip
    Console(width=None if os.isatty(1) else 160).print(table)
