"""A plan on a terminal."""

from rich.console import Console
from rich.table import Table

from anabranch.planner import tables
from anabranch.planner.answer import RUNNERS_UP, Answer


def show(found: Answer, explain: bool, console: Console | None = None) -> None:
    """explain: with every assumption and its source."""
    console = console or Console()
    shown = [tables.result(found), tables.runners_up(found, RUNNERS_UP), tables.clusters(found)]
    for table in shown[: 2 if len(shown[2].rows) == 1 else 3]:
        console.print(_drawn(table))
    for line in [*tables.comparison(found), *found.unmeasured]:
        console.print(f"- {line}", highlight=False, soft_wrap=True, markup=False)
    if explain:
        console.print(_drawn(tables.assumptions(found)))


def _drawn(table: tables.Table) -> Table:
    drawn = Table(title=table.title, title_justify="left")
    for name in table.columns:
        drawn.add_column(name, overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
