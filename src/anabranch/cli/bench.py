"""`anabranch bench planner`, `anabranch bench balance` and `anabranch bench cluster`."""

import json
import os
import platform
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.bench_balance import BalanceBench
from anabranch.cli.bench_codecs import bench_codecs
from anabranch.cli.bench_planner import bench_planner
from anabranch.cli.cluster_cases import ClusterCases
from anabranch.cli.cluster_grid import full_grid, measure, print_cells, print_explained, quick_grid, verdict
from anabranch.cli.fail import fails_clearly
from anabranch.cli.launch import launch
from anabranch.cli.process import under_torchrun
from anabranch.errors import ConfigError, TraceError
from anabranch.training.config import DTYPES
from anabranch.training.folder import require_folder
from anabranch.transport.choose import require_transport
from anabranch.workload.trace import load_trace

bench = typer.Typer(help="Measure; every figure in the documentation comes from here.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="write {machine, rows} to this file")]


@bench.command()
@fails_clearly
def planner(
    rounds: Annotated[int, typer.Option(min=1, help="plans timed per case")] = 200, json_file: JsonFile = None
) -> None:
    """Time the planners on skewed loads, on one thread."""
    _check_json(json_file)
    rows = bench_planner(rounds)
    columns = ("planner", "ranks", "experts", "plan_us_median", "plan_us_p90", "assign_us_median", "guests",
               "max_mean_before", "max_mean_after")  # fmt: skip
    _report(rows, columns, json_file)


@bench.command()
@fails_clearly
def balance(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option(help="a narrower layer and fewer rounds: under 3 minutes")] = False,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="group sizes [default: 2 and 4]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds per policy")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    transport: Annotated[str, typer.Option(help="of our policies")] = "dedup",
    max_mean: Annotated[float, typer.Option(min=1.0, help="rank max/mean of the stress workloads")] = 1.5,
    trace: Annotated[
        Path | None, typer.Option(help="a trace with token ids [default: the one that ships]")
    ] = None,
) -> None:
    """One MoE layer, forward and backward, under every policy and workload, interleaved in one run."""
    _check_json(json_file)
    size = BalanceBench(
        2,
        rounds=rounds,
        dtype=dtype,
        transport=transport,
        max_mean=max_mean,
        trace=str(trace or natural_trace()),
    )
    _check(size, max(ranks or (2,)))
    if quick:
        size = replace(size, hidden=192, width=384, rounds=5)
    rows: list[dict[str, Any]] = []
    for count in ranks or (2, 4):
        # More ranks than cores share them: fewer tokens a rank keep the work, and the run, the same size.
        tokens = size.tokens * 2 // max(2, count)
        rows += launch("bench_balance", asdict(replace(size, ranks=count, tokens=tokens)), count)["rows"]
    columns = ("ranks", "workload", "policy", "max_mean_before", "max_mean_after", "guests", "step_ms_median",
               "step_ms_spread", "speedup_vs_transformers", "percent_of_ideal")  # fmt: skip
    _report(rows, columns, json_file)


@bench.command()
@fails_clearly
def cluster(
    json_file: JsonFile = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="under 5 minutes: one topology, three workloads")
    ] = False,
    rounds: Annotated[int, typer.Option(min=2, help="measured rounds per policy")] = 5,
    tokens: Annotated[int, typer.Option(min=64, help="tokens a rank")] = 256,
    max_mean: Annotated[float, typer.Option(min=1.0, help="rank max/mean of the stress workloads")] = 2.0,
    topology: Annotated[list[str] | None, typer.Option(help="only this one, such as 2x2; repeatable")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="show what auto chooses from, for one layer")
    ] = False,
) -> None:
    """A whole model's step under every policy, on emulated nodes with shaped links; as root."""
    _check_json(json_file)
    grid = (quick_grid if quick else full_grid)(os.cpu_count() or 1).only(topology or [])
    cases = ClusterCases(1, 32, 8, tokens, 2, max_mean, str(natural_trace("tiny8")))
    about = {**machine(), "tokens": tokens, "rounds": rounds, "model": "tiny8"}
    rows: list[dict[str, Any]] = []
    for more, explained in measure(grid, cases, rounds, slots=4, epsilon=0.05, explain=explain):
        rows += more
        if json_file is not None:  # after each lab: an interruption keeps what was measured
            json_file.parent.mkdir(parents=True, exist_ok=True)
            found = {"machine": about, "rows": rows, "verdict": asdict(verdict(rows))}
            json_file.write_text(json.dumps(found, indent=1))
        print_cells(more)
        if explain:
            print_explained(explained)
    typer.echo(verdict(rows).text())


@bench.command()
@fails_clearly
def codecs(
    json_file: JsonFile = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of each run")] = 200,
) -> None:
    """Train once with each wire codec: its effect on the final validation loss, and on a gradient."""
    _check_json(json_file)
    with tempfile.TemporaryDirectory(prefix="anabranch-codecs-") as folder:
        rows = list(bench_codecs(steps, Path(folder)))
    columns = ("dispatch_wire", "combine_wire", "bytes_a_number", "eval_loss", "eval_loss_change_percent",
               "gradient_relative_error", "gradient_cosine")  # fmt: skip
    _report(rows, columns, json_file)


def natural_trace(preset: str = "tiny") -> Path:
    """The recorded routing of a preset that ships with the package (docs/trace.md: the command that made it)."""
    return Path(__file__).parent.parent / "workload" / f"natural_{preset}.npz"


def _check(size: BalanceBench, ranks: int) -> None:
    """Raise ConfigError or TraceError for what cannot be measured, before a process is started."""
    if under_torchrun():
        raise ConfigError("the benchmark starts its own ranks; run it without torchrun", setting="ranks")
    require_transport(size.transport)
    if size.dtype not in DTYPES:
        raise ConfigError(f"{size.dtype!r} is unknown; use {' or '.join(DTYPES)}", setting="dtype")
    if ranks > size.experts:
        raise ConfigError(f"{ranks} would share {size.experts} experts; use at most that", setting="ranks")
    trace = load_trace(Path(size.trace))
    if trace.ids is None or not len(trace.ids):
        raise TraceError(f"{size.trace} has no token ids; record it with --ids", setting="trace")
    told = {"experts": size.experts, "top_k": size.top_k}
    found = {name: trace.metadata[name] for name in told}
    if found != told:
        raise TraceError(
            f"{size.trace} is of {found['experts']} experts, {found['top_k']} a token, the measured layer of "
            f"{size.experts}, {size.top_k} a token; record one of the preset tiny",
            setting="trace",
        )


def _check_json(json_file: Path | None) -> None:
    """Figures that took minutes are not lost for want of a folder."""
    if json_file is not None:
        require_folder("json", json_file.absolute().parent)
        if json_file.is_dir():
            raise ConfigError(f"{json_file} is a folder; name a file", setting="json")


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    model = next(names, platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def _report(rows: list[dict[str, Any]], columns: tuple[str, ...], json_file: Path | None) -> None:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("workload", "policy", "planner") else "right")
    for row in rows:
        table.add_row(
            *(f"{v:.3g}" if isinstance(v := row[c], float) and abs(v) < 100 else str(v) for c in columns)
        )
    Console(width=None if os.isatty(1) else 160).print(table)
