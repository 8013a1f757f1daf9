"""`anabranch bench validation`: predicted steps beside published ones, that the model had not seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.fail import fails_clearly
from anabranch.cli.results import require_json_file, write_results
from anabranch.costs.training.published import TABLE, Unusable, read_published
from anabranch.costs.training.validation import (
    Scored,
    Summary,
    constant_mfu,
    cross_validate,
    layout_regrets,
    leave_out,
    score_table,
    without_skew,
)
from anabranch.errors import DataError
from anabranch.planner.search import layouts_per_s


@fails_clearly
def validation(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write {rows, summary} to this file")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="another table in the form of the published one, scored by its rows")
    ] = None,
) -> None:
    """Predict published training steps that the model has not seen; beside it two simpler models."""
    require_json_file(json_file)
    found = bench_validation(table)
    write_results(json_file, **found)
    summary = found["summary"]
    shown = Table(title=f"{summary['rows']} runs, {summary['unusable']} not simulated", title_justify="left")
    for column in ("predicted by", "mean error, %", "median, %", "90th, %", "in the 90 % interval"):
        shown.add_column(column, justify="left" if column == "predicted by" else "right")
    baselines = summary["baselines"]
    lines = {
        "the calibrated model": summary,
        "the same, without skew": baselines["without_skew"],
        "a constant utilisation": baselines["constant_mfu"],
        "no run of the same model seen": summary.get("leave_one_model_out"),
        "no run on the same chip seen": summary.get("leave_one_hardware_out"),
    }
    for name, one in lines.items():
        if one is not None:
            figures = [f"{one[key]:.1f}" for key in Summary._fields]
            covered = f"{one['coverage90']:.0%}" if "coverage90" in one else ""
            shown.add_row(name, *figures, covered)
    Console().print(shown)
    for one in found["unusable"]:
        typer.echo(f"not simulated: {one['id']}: {one['reason']}")
    typer.echo(
        f"layout regret: median {summary['layout_regret_median_pct']} % of {summary['layout_choices']} choices; "
        f"{summary['layouts_per_s']:,} layouts a second"
    )


def bench_validation(table: Path | None) -> dict[str, Any]:
    """{rows, unusable, summary}. Without a table: the shipped one, cross-validated, and whole models and chips left
    out. Raises DataError where no row can be simulated."""
    rows, unusable = read_published(table or TABLE)
    if not rows:
        raise DataError(f"none of {len(unusable)} rows can be simulated: {_first(unusable)}", setting="table")
    shipped = rows if table is None else read_published()[0]
    scored = cross_validate(rows) if table is None else score_table(rows, shipped)
    flat = without_skew(rows)
    plain = cross_validate(flat) if table is None else score_table(flat, shipped)
    summary = _summary(scored) | {
        "rows": len(rows),
        "unusable": len(unusable),
        "layouts_per_s": round(layouts_per_s()),
        "baselines": {
            "constant_mfu": Summary.of(constant_mfu(rows, shipped))._asdict(),
            "without_skew": _summary(plain),
        },
    }
    if table is None:
        summary["leave_one_model_out"] = _summary(leave_out(rows, lambda row: row.setup.shape.family))
        summary["leave_one_hardware_out"] = _summary(leave_out(rows, lambda row: row.setup.cluster.chip.kind))
    reasons = [{"id": one.id, "reason": one.reason} for one in unusable]
    return {"rows": [_row(one) for one in scored], "unusable": reasons, "summary": _rounded(summary)}


def _summary(scored: Sequence[Scored]) -> dict[str, Any]:
    regrets = layout_regrets(scored)
    return Summary.of([one.error_pct for one in scored])._asdict() | {
        "coverage90": float(np.mean([one.covered for one in scored])),
        "layout_regret_median_pct": float(np.median(regrets)) if regrets else None,
        "layout_choices": len(regrets),
    }


def _row(one: Scored) -> dict[str, Any]:
    setup = one.row.setup
    return {
        "id": one.row.id, "model": setup.shape.family, "hardware": setup.cluster.chip.kind,
        "chips": setup.layout.chips, "quantity": one.row.quantity, "measured": one.row.measured,
        "predicted": float(f"{one.predicted:.5g}"), "low90": float(f"{one.low90:.5g}"),
        "high90": float(f"{one.high90:.5g}"), "error_pct": round(one.error_pct, 2), "covered": one.covered,
    }  # fmt: skip


def _first(unusable: Sequence[Unusable]) -> str:
    return f"{unusable[0].id}: {unusable[0].reason}" if unusable else "the table is empty"


def _rounded(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _rounded(value)
        if isinstance(value, dict)
        else round(value, 4)
        if isinstance(value, float)
        else value
        for name, value in summary.items()
    }
