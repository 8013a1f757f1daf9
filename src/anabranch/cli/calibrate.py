"""`anabranch calibrate`: fit the step-time model on published runs and on your own."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.fail import fails_clearly
from anabranch.costs.training.calibration import calibrate as fit
from anabranch.costs.training.calibration import quantile
from anabranch.costs.training.published import TABLE, read_published
from anabranch.errors import ConfigError


@fails_clearly
def calibrate(
    out: Annotated[Path, typer.Argument(help="where the calibration is written, JSON")],
    table: Annotated[
        list[Path] | None, typer.Option(help="runs of your own, in the form of the published table")
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="without the published runs")] = False,
) -> None:
    """Fit efficiencies and intervals on the published runs and those of --table; `anabranch plan` takes the file."""
    tables = [*([] if only else [TABLE]), *(table or [])]
    if not tables:
        raise ConfigError("without the published runs give your own by --table", setting="only")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {out.absolute().parent}", setting="out")
    read = [read_published(path) for path in tables]
    rows = [row for good, _ in read for row in good]
    for unusable in (one for _, bad in read for one in bad):
        typer.echo(f"not used: {unusable.id}: {unusable.reason}", err=True)
    fitted = fit(rows)
    fitted.save(out, tables)
    shown = Table(title=f"{len(rows)} runs; seconds needed over nominal seconds", title_justify="left")
    shown.add_column("component")
    shown.add_column("factor", justify="right")
    for name, factor in fitted.efficiency.factors.items():
        shown.add_row(name, f"{factor:.2f}")
    Console().print(shown)
    typer.echo(
        f"unseen runs: 90 of 100 within {quantile(fitted.scores, 0.9):.2f} deviations; written to {out}"
    )
