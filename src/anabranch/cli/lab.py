"""`anabranch lab run`, `anabranch lab check` and `anabranch lab clean`."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.fail import fails_clearly
from anabranch.cli.process import refuse_torchrun, say, usable_cores
from anabranch.cli.results import require_json_file, write_results
from anabranch.errors import AnabranchError, ConfigError
from anabranch.lab.check import Finding, check
from anabranch.lab.cluster import Lab
from anabranch.lab.kernel import available, has_netem
from anabranch.lab.ownership import clean
from anabranch.lab.spec import LabSpec, parse_rate

lab = typer.Typer(
    help="An emulated cluster: several nodes on this machine, as root.",
    no_args_is_help=True,
    add_completion=False,
)

Nodes = Annotated[int, typer.Option(help="nodes")]
RanksPerNode = Annotated[int, typer.Option(help="ranks on each node")]
Inter = Annotated[str, typer.Option(help="what a node may send, and receive: 200mbit, 1gbit, none")]
Intra = Annotated[str, typer.Option(help="what the ranks of a node together send each other: 5gbit, none")]
Cpu = Annotated[float | None, typer.Option(help="cores a rank may use [default: no limit]")]


@lab.command(context_settings={"allow_interspersed_args": False})
@fails_clearly
def run(
    command: Annotated[list[str], typer.Argument(help="the command of one rank, after --")],
    nodes: Nodes = 2,
    ranks_per_node: RanksPerNode = 2,
    inter: Inter = "none",
    intra: Intra = "none",
    cpu: Cpu = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="end it after so many seconds, with 124")
    ] = None,
) -> None:
    """Run a command on every rank of an emulated cluster, under torchrun, and end with its exit status."""
    spec = _spec(nodes, ranks_per_node, inter, intra, cpu)
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]!r} is not to be found; name a program", setting="command")
    with Lab(spec) as cluster:
        status = cluster.run(command, timeout_s=timeout)
    raise typer.Exit(status)


@lab.command("check")
@fails_clearly
def check_command(
    nodes: Nodes = 2,
    ranks_per_node: RanksPerNode = 2,
    inter: Inter = "none",
    intra: Intra = "none",
    cpu: Cpu = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write {machine, rows} to this file")
    ] = None,
) -> None:
    """Set a cluster up, and measure every link and every quota of it: what was set, what is delivered."""
    spec = _spec(nodes, ranks_per_node, inter, intra, cpu)
    require_json_file(json_file)
    with Lab(spec) as cluster:
        findings = list(check(cluster))
    netem = has_netem()
    rows = [finding._asdict() for finding in findings]
    write_results(json_file, rows, {"lab": str(spec), "kernel_has_netem": netem})
    Console(width=None if os.isatty(1) else 120).print(_table(findings))
    typer.echo(f"Delay: not offered; this kernel {'has' if netem else 'has no'} netem.")


@lab.command("clean")
@fails_clearly
def clean_command() -> None:
    """Remove what labs have left whose owners are gone; `lab run` does so too."""
    if reason := available():
        raise AnabranchError(reason, setting="lab")
    cleaned = clean()
    for name in cleaned.removed:
        typer.echo(f"removed {name}")
    for name in cleaned.running:
        typer.echo(f"left {name}: its owner runs")
    if not cleaned.removed and not cleaned.running:
        typer.echo("nothing to remove")


def _spec(nodes: int, ranks_per_node: int, inter: str, intra: str, cpu: float | None) -> LabSpec:
    """The shape; with a word on stderr where this machine cannot make its ranks equal devices."""
    refuse_torchrun("the lab", "lab")
    spec = LabSpec(nodes, ranks_per_node, parse_rate(inter, "inter"), parse_rate(intra, "intra"), cpu)
    if warning := spec.too_much_for(usable_cores()):
        say(f"warning: {warning}")
    return spec


def _table(findings: list[Finding]) -> Table:
    table = Table("kind", "where")
    for column in ("set", "delivered", "unit", "%"):
        table.add_column(column, justify="right")
    for one in findings:
        goal = "none" if one.set is None else f"{one.set:g}"
        percent = "" if one.percent is None else f"{one.percent:.1f}"
        table.add_row(one.kind, one.where, goal, f"{one.delivered:.4g}", one.unit, percent)
    return table
