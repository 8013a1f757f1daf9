"""`anabranch bench validation`: predicted steps beside published ones, that the model had not seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
