"""`anabranch bench cluster`, the launching side: a lab for each topology and link, and all cells in it."""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from anabranch.cli.cluster_book import Book
from anabranch.cli.cluster_cases import NATURAL, ClusterCases, workload_names
from anabranch.cli.cluster_settings import ClusterBench
from anabranch.cli.cluster_verdict import Row, print_cells, print_explained
from anabranch.cli.fail import RankDiedError
from anabranch.cli.launch import told_cause
from anabranch.cli.process import say
from anabranch.errors import ConfigError
from anabranch.lab.cluster import Lab
from anabranch.lab.spec import LabSpec
from anabranch.training.presets import presets

MODEL = "tiny8"
INTRA_MBIT = 5_000.0
QUICK_WORKLOADS = ["W0", "W2", NATURAL]
# Ranks whose tokens a rank are as asked; a lab of more ranks gives each fewer, so that all do the same work.
USUAL_RANKS = 4
# Of torch's groups by itself.
TIMEOUT_S = 1800


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

    def missing(self, spec: LabSpec, book: Book) -> list[str]:
        """The workloads of one lab that were not measured yet."""
        return [w for w in self.workloads if not book.holds(topology(spec), spec.inter_mbit, w)]


class Measuring(NamedTuple):
    """How the cells of a grid are measured: what `ClusterBench` says of it, but for what each lab sets."""

    rounds: int
    slots: int
    epsilon: float
    explain: bool


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
    return Grid(labs, workload_names())


def quick_grid(cores: int) -> Grid:
    """The slowest link of the first topology, three workloads."""
    return Grid(full_grid(cores).labs[:1], QUICK_WORKLOADS)


def measure(grid: Grid, cases: ClusterCases, how: Measuring, book: Book) -> None:
    """One lab after the other; each cell goes into the book, and is shown, as soon as it is measured.

    Raises AnabranchError where a lab cannot be set up or a rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="anabranch-cluster-") as name:
        folder = Path(name)
        write_model(folder / "model")
        for number, spec in enumerate(grid.labs):
            here = replace(
                cases, ranks=spec.ranks, tokens=cases.tokens * USUAL_RANKS // max(USUAL_RANKS, spec.ranks)
            )
            about = {
                "topology": topology(spec),
                "inter_mbit": spec.inter_mbit,
                "intra_mbit": spec.intra_mbit,
                "cpu": spec.cpu,
                "ranks": spec.ranks,
                "tokens": here.tokens,
            }
            if workloads := grid.missing(spec, book):
                own = folder / str(number)
                bench = ClusterBench(str(folder / "model"), here, workloads, *how, str(own), spec.cpu)
                result = in_lab(
                    "bench_cluster", spec, own, bench, lambda rows, about=about: _keep(rows, about, book)
                )
                if how.explain:
                    print_explained([about | row for row in result["explained"]])
            elif how.explain:
                link = "unshaped" if spec.inter_mbit is None else f"at {spec.inter_mbit} Mbit/s"
                say(f"{topology(spec)} {link}: its cells are in the file, nothing is explained")


def _keep(rows: list[Row], about: dict[str, Any], book: Book) -> None:
    book.add([about | row for row in rows])
    print_cells(book.rows[-len(rows) :])


def cases_of_model(tokens: int, max_mean: float, trace: Path) -> ClusterCases:
    """What MODEL is routed; each lab sets its ranks. tokens: of each of USUAL_RANKS ranks."""
    config: Any = presets()[MODEL].config
    experts, top_k, layers = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    return ClusterCases(1, experts, top_k, tokens, layers, max_mean, str(trace))


def write_model(folder: Path) -> None:
    """Initial weights of MODEL: every policy and every lab starts from them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()[MODEL].config).save_pretrained(folder)


def in_lab(
    name: str, spec: LabSpec, folder: Path, bench: ClusterBench, keep: Callable[[list[Row]], None]
) -> dict[str, list[Row]]:
    """The result of the job `name` of one lab's ranks; `keep` gets each cell's rows as they are put down.

    Raises AnabranchError where the lab cannot be set up or a rank fails, RankDiedError where one died.
    """
    folder.mkdir()
    job = folder / "job.json"
    job.write_text(json.dumps({"job": name, "settings": asdict(bench), "launcher": None}))

    def collect() -> None:
        for cell in sorted(folder.glob("cell-*.json")):
            keep(json.loads(cell.read_text()))
            cell.unlink()

    with Lab(spec) as lab:
        status = lab.run([sys.executable, "-P", "-m", "anabranch.cli.rank", str(job)], meanwhile=collect)
    collect()
    if cause := told_cause(folder, TIMEOUT_S):
        raise cause
    if status:
        raise RankDiedError(f"the ranks of the lab {spec} ended with {status}")
    return json.loads((folder / "result.json").read_text())
