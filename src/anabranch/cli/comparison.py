"""One run's summary, or several side by side, as a table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from anabranch.telemetry.record import ENERGY_TOLD

ROWS = (
    ("steps", "steps", "{:d}"),
    ("first loss", "first_loss", "{:.4f}"),
    ("last loss", "last_loss", "{:.4f}"),
    ("validation loss", "eval_loss", "{:.4f}"),
    ("step, median ms", "step_ms_median", "{:.1f}"),
    ("tokens/s, median", "tokens_per_s", "{:,.0f}"),
    ("rank max/mean before", "max_mean_before", "{:.3f}"),
    ("rank max/mean after", "max_mean_after", "{:.3f}"),
    ("guests a step", "guests_per_step", "{:.1f}"),
    ("token MB a step", "token_mb_per_step", "{:.2f}"),
    ("weight MB a step", "weight_mb_per_step", "{:.2f}"),
    ("joules a step", "joules_per_step", "{:.2f}"),
    ("joules a token", "joules_per_token", "{:.3g}"),
)


def print_summaries(summaries: list[dict[str, Any]], out: str, console: Console | None = None) -> None:
    """summaries: of `RunSummary.to_dict`; the first is the run, the others what it is compared to."""
    console = console or Console()
    table = Table(title="the same data and weights" if len(summaries) > 1 else None)
    table.add_column("")
    for summary in summaries:
        table.add_column(summary["planner"], justify="right")
    for label, key, form in ROWS:
        table.add_row(label, *("-" if s[key] is None else form.format(s[key]) for s in summaries))
    console.print(table)
    for other in summaries[1:]:
        ratio = other["step_ms_median"] / summaries[0]["step_ms_median"]
        _line(console, f"{other['planner']} takes {ratio:.2f} times the step of {summaries[0]['planner']}; "
                       f"{_apart(summaries[0], other)}")  # fmt: skip
    _line(console, f"joules {ENERGY_TOLD[summaries[0]['energy_source']]}; written to {out}")


def _apart(one: dict[str, Any], other: dict[str, Any]) -> str:
    """How far the losses of two runs over the same steps differ at most."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    apart = max(abs(a - b) / abs(b) for a, b in pairs if a is not None and b)
    return f"their losses differ by at most {apart:.1e}, relatively"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
