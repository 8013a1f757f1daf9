"""`anabranch bench planner` and `anabranch bench balance`."""

import json
import os
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.bench_balance import BalanceBench
from anabranch.cli.bench_planner import bench_planner
from anabranch.cli.fail import fails_clearly
from anabranch.cli.launch import launch

bench = typer.Typer(help="Measure; every figure in the documentation comes from here.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="write {machine, rows} to this file")]


@bench.command()
@fails_clearly
def planner(
    rounds: Annotated[int, typer.Option(help="plans timed per case")] = 200, json_file: JsonFile = None
) -> None:
    """Time the planners on skewed loads, on one thread."""
    rows = bench_planner(rounds)
    columns = ("planner", "ranks", "experts", "plan_us_median", "plan_us_p90", "assign_us_median", "guests",
               "max_mean_before", "max_mean_after")  # fmt: skip
    _report(rows, columns, json_file)


@bench.command()
@fails_clearly
def balance(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option(help="a narrower layer and fewer rounds: under 3 minutes")] = False,
    ranks: Annotated[list[int] | None, typer.Option(help="group sizes [default: 2 and 4]")] = None,
    rounds: Annotated[int, typer.Option(help="measured rounds per policy")] = 7,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    transport: Annotated[str, typer.Option(help="of our policies")] = "auto",
    max_mean: Annotated[float, typer.Option(help="rank max/mean of the stress workloads")] = 1.5,
) -> None:
    """One MoE layer, forward and backward, under every policy and workload, interleaved in one run."""
    size = BalanceBench(
        2, rounds=rounds, dtype=dtype, transport=transport, max_mean=max_mean, trace=natural_trace()
    )
    if quick:
        size = replace(size, hidden=256, width=512, rounds=5)
    rows: list[dict[str, Any]] = []
    for count in ranks or (2, 4):
        # More ranks than cores share them: fewer tokens a rank keep the work, and the run, the same size.
        tokens = size.tokens * 2 // max(2, count)
        rows += launch("bench_balance", asdict(replace(size, ranks=count, tokens=tokens)), count)["rows"]
    columns = ("ranks", "workload", "policy", "max_mean_before", "max_mean_after", "guests", "step_ms_median",
               "step_ms_spread", "speedup_vs_transformers", "percent_of_ideal")  # fmt: skip
    _report(rows, columns, json_file)


def natural_trace() -> str:
    """The recorded routing that ships with the package (see docs/trace.md for the command that made it)."""
    return str(Path(__file__).parent.parent / "workload" / "natural_tiny.npz")


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
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
