"""`anabranch bench cluster`, the launching side: a lab for each topology and link, and the verdict over the grid."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from anabranch.cli.bench_cluster import ClusterBench
from anabranch.cli.cluster_cases import NATURAL, ClusterCases
from anabranch.errors import AnabranchError, ConfigError
from anabranch.lab.cluster import Lab
from anabranch.lab.spec import LabSpec
from anabranch.training.presets import presets

MODEL = "tiny8"
INTRA_MBIT = 5_000.0
QUICK_WORKLOADS = ["W0", "W2", NATURAL]
Row = dict[str, Any]


class Grid(NamedTuple):
    """Which labs are set up, and what is measured in each."""

    labs: list[LabSpec]
    workloads: list[str]

    def only(self, topologies: Sequence[str]) -> "Grid":
        """These topologies' labs; all where none is named. Raises ConfigError for one that is not in the grid."""
        known = list(dict.fromkeys(topology(spec) for spec in self.labs))
        for name in topologies:
            if name not in known:
                raise ConfigError(
                    f"{name!r} is not measured; choose of {', '.join(known)}", setting="topology"
                )
        return Grid([s for s in self.labs if topology(s) in (topologies or known)], self.workloads)


@dataclass(frozen=True)
class Verdict:
    """What the grid says of `auto`. Ratios of step times; a cell is one lab and one workload.

    worst_vs_transformers, worst_vs_best_fixed: its time over theirs in the worst cell. median_speedup: over
    cells of max/mean >= 1.5. prediction_error: median of |predicted / measured - 1| over all rows predicted.
    """

    cells: int
    worst_vs_transformers: float
    worst_vs_best_fixed: float
    skewed_cells: int
    median_speedup: float
    prediction_error: float

    def text(self) -> str:
        """For people."""
        return (
            f"{self.cells} cells: auto takes at most {self.worst_vs_transformers:.3f} of transformers' time and "
            f"{self.worst_vs_best_fixed:.3f} of the best fixed choice's; median speed-up {self.median_speedup:.2f} "
            f"over {self.skewed_cells} cells of max/mean >= 1.5; predictions err by {self.prediction_error:.1%} "
            "in the median"
        )


def topology(spec: LabSpec) -> str:
    """Nodes by ranks a node."""
    return f"{spec.nodes}x{spec.ranks_per_node}"


def full_grid(cores: int) -> Grid:
    """Three topologies by three links; quotas that the cores can grant to all ranks."""
    labs = [
        LabSpec(nodes, per_node, inter_mbit, INTRA_MBIT, round(min(0.9 * cores / (nodes * per_node), 0.9), 2))
        for nodes, per_node in ((2, 2), (4, 1), (2, 4))
        for inter_mbit in (200.0, 1_000.0, None)
    ]
    return Grid(labs, [])


def quick_grid(cores: int) -> Grid:
    """Two links of the first topology, three workloads."""
    return Grid(full_grid(cores).labs[:2], QUICK_WORKLOADS)


class Measured(NamedTuple):
    """One lab. explained: what `auto` chooses from, where asked."""

    rows: list[Row]
    explained: list[Row]


def measure(
    grid: Grid, cases: ClusterCases, rounds: int, slots: int, epsilon: float, *, explain: bool
) -> Iterator[Measured]:
    """One lab after the other. Raises AnabranchError where a lab cannot be set up or a rank fails."""
    with tempfile.TemporaryDirectory(prefix="anabranch-cluster-") as name:
        folder = Path(name)
        write_model(folder / "model")
        for number, spec in enumerate(grid.labs):
            here = replace(cases, ranks=spec.ranks)
            bench = ClusterBench(
                str(folder / "model"), here, grid.workloads or here.names(), rounds, slots, epsilon,
                str(folder / f"cache{number}"), spec.cpu, explain,
            )  # fmt: skip
            result = _in_lab(spec, folder / str(number), bench)
            about = {
                "topology": topology(spec),
                "inter_mbit": spec.inter_mbit,
                "intra_mbit": spec.intra_mbit,
                "cpu": spec.cpu,
                "ranks": spec.ranks,
                "tokens": here.tokens,
                "rounds": rounds,
            }
            rows, explained = ([about | row for row in result[part]] for part in ("rows", "explained"))
            yield Measured(rows, explained)


def cases_of_model(tokens: int, max_mean: float, trace: Path) -> ClusterCases:
    """What MODEL is routed; each lab sets its ranks."""
    config: Any = presets()[MODEL].config
    experts, top_k, layers = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    return ClusterCases(1, experts, top_k, tokens, layers, max_mean, str(trace))


def write_model(folder: Path) -> None:
    """Initial weights of MODEL: every policy and every lab starts from them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()[MODEL].config).save_pretrained(folder)


def _in_lab(spec: LabSpec, folder: Path, bench: ClusterBench) -> dict[str, list[Row]]:
    folder.mkdir()
    job = folder / "job.json"
    job.write_text(json.dumps({"job": "bench_cluster", "settings": asdict(bench), "launcher": None}))
    with Lab(spec) as lab:
        status = lab.run([sys.executable, "-m", "anabranch.cli.rank", str(job)])
    if errors := sorted(folder.glob("error-*.json")):
        raise AnabranchError(json.loads(errors[0].read_text())["message"])
    if crashes := sorted(folder.glob("crash-*.json")):
        raise AnabranchError(json.loads(crashes[0].read_text())["traceback"])
    if status:
        raise AnabranchError(f"the ranks of the lab {spec} ended with {status}")
    return json.loads((folder / "result.json").read_text())


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
    )


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
    """One lab and one workload. best: the fastest fixed lossless row; to_best: auto's time over its."""

    auto: Row
    theirs: Row
    best: Row
    to_best: float


def _cells(rows: Sequence[Row]) -> list[_Cell]:
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["topology"], row["inter_mbit"], row["workload"]), []).append(row)
    return [_cell(found) for found in grouped.values()]


def _cell(rows: list[Row]) -> _Cell:
    (auto,), (theirs,) = ([r for r in rows if r["policy"] == name] for name in ("auto", "transformers"))
    fixed = [r for r in rows if r["policy"] not in ("auto", "ideal") and r["codec"] == "none"]
    best = min(fixed, key=lambda row: row["step_ms_median"])
    return _Cell(auto, theirs, best, _to_best(auto, fixed))


def _to_best(auto: Row, fixed: list[Row]) -> float:
    """auto's time over that of the best fixed choice, median over rounds.

    The best is chosen by the other half of the rounds than those it is compared in: the smallest of a dozen noisy
    medians is smaller than any of them truly is.
    """
    times = np.array([row["step_ms_rounds"] for row in fixed])
    own = np.array(auto["step_ms_rounds"])
    ratios: list[float] = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        others = np.delete(times, np.arange(times.shape[1])[half], axis=1)
        best = int(np.median(others, axis=1).argmin())
        ratios += (own[half] / times[best][half]).tolist()
    return float(np.median(ratios))
