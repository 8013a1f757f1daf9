"""`anabranch bench cluster`, the launching side: a lab for each topology and link, and the verdict over the grid."""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from anabranch.cli.bench_cluster import ClusterBench
from anabranch.cli.cluster_cases import NATURAL, ClusterCases
from anabranch.errors import AnabranchError
from anabranch.lab.cluster import Lab
from anabranch.lab.spec import LabSpec
from anabranch.training.presets import presets

MODEL = "tiny8"
INTRA_MBIT = 5_000.0
QUICK_WORKLOADS = ["W0", "W2", NATURAL]


class Grid(NamedTuple):
    """Which labs are set up, and what is measured in each."""

    labs: list[LabSpec]
    workloads: list[str]


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


def measure(
    grid: Grid, cases: ClusterCases, rounds: int, slots: int, epsilon: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one lab after the other. Raises AnabranchError where a lab cannot be set up or a rank fails."""
    with tempfile.TemporaryDirectory(prefix="anabranch-cluster-") as name:
        folder = Path(name)
        write_model(folder / "model")
        for number, spec in enumerate(grid.labs):
            here = replace(cases, ranks=spec.ranks)
            bench = ClusterBench(
                str(folder / "model"), here, grid.workloads or here.names(), rounds, slots, epsilon,
                str(folder / f"cache{number}"), spec.cpu,
            )  # fmt: skip
            rows = _in_lab(spec, folder / str(number), bench)
            about = {
                "topology": f"{spec.nodes}x{spec.ranks_per_node}",
                "inter_mbit": spec.inter_mbit,
                "intra_mbit": spec.intra_mbit,
                "cpu": spec.cpu,
                "ranks": spec.ranks,
                "tokens": here.tokens,
                "rounds": rounds,
            }
            yield [about | row for row in rows]


def write_model(folder: Path) -> None:
    """Initial weights of the preset tiny: every policy and every lab starts from them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()[MODEL].config).save_pretrained(folder)


def _in_lab(spec: LabSpec, folder: Path, bench: ClusterBench) -> list[dict[str, Any]]:
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
    return json.loads((folder / "result.json").read_text())["rows"]


def verdict(rows: list[dict[str, Any]]) -> Verdict:
    """Over all cells of `rows`."""
    cells: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cell = cells.setdefault((row["topology"], row["inter_mbit"], row["workload"]), {})
        cell.setdefault(row["policy"], []).append(row)
    to_theirs, to_best, speedups = [], [], []
    for cell in cells.values():
        (auto,), (theirs,) = cell["auto"], cell["transformers"]
        fixed = [
            row["step_ms_median"]
            for name, found in cell.items()
            for row in found
            if name not in ("auto", "ideal") and row["codec"] == "none"
        ]
        to_theirs.append(1.0 / auto["speedup_vs_transformers"])
        to_best.append(auto["step_ms_median"] / min(fixed))
        if theirs["max_mean_before"] >= 1.5:
            speedups.append(auto["speedup_vs_transformers"])
    errors = [
        abs(r["predicted_ms"] / r["step_ms_median"] - 1.0) for r in rows if r["predicted_ms"] is not None
    ]
    return Verdict(
        len(cells), max(to_theirs), max(to_best), len(speedups),
        float(np.median(speedups)) if speedups else float("nan"), float(np.median(errors)),
    )  # fmt: skip
