"""The live view of a training run: one table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from anabranch.telemetry.record import LayerRecord, StepRecord

# Off a terminal a line every so many seconds is enough to see that the run lives.
LINE_EVERY_S = 10.0


class RunDisplay:
    """A sink that shows the latest step. On a terminal a live table, else a line now and then."""

    def __init__(self, title: str, steps: int, console: Console | None = None) -> None:
        self.title = title
        self.steps = steps
        self.console = console or Console()
        self._first: tuple[int, float] | None = None
        self._line_s = 0.0
        self._eval_loss: float | None = None
        self._joules = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
        )
        self._task = self._progress.add_task(title, total=steps)
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def write(self, record: StepRecord, layers: Sequence[LayerRecord] = ()) -> None:
        now_s = time.monotonic()
        self._first = self._first or (record.step, now_s)
        self._joules += record.joules
        self._eval_loss = record.eval_loss if record.eval_loss is not None else self._eval_loss
        if self._live is not None:
            self._progress.update(self._task, completed=record.step)
            self._live.update(self._table(record, now_s))
        elif now_s - self._line_s >= LINE_EVERY_S or record.step in (1, self.steps):
            self._line_s = now_s
            shown = "  ".join(f"{name} {value}" for name, value in self._facts(record, now_s))
            self.console.print(f"{self.title}  {shown}", soft_wrap=True, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _facts(self, record: StepRecord, now_s: float) -> list[tuple[str, str]]:
        assert self._first is not None
        done = record.step - self._first[0]
        left_s = (now_s - self._first[1]) / done * (self.steps - record.step) if done else None
        facts = [
            ("step", f"{record.step}/{self.steps}"),
            ("loss", f"{record.loss:.4f}"),
            ("tokens/s", f"{record.tokens_per_s:,.0f}"),
            ("rank max/mean", f"{record.max_mean_before:.3f} -> {record.max_mean_after:.3f}"),
            ("guests", str(record.guests)),
            ("wire MB", f"{record.token_bytes / 1e6:.1f} tokens + {record.weight_bytes / 1e6:.1f} weights"),
            ("joules", f"{self._joules:,.0f} ({'RAPL' if record.energy_source == 'rapl' else 'estimated'})"),
            ("ETA", "-" if left_s is None else f"{left_s:.0f} s"),
        ]
        if self._eval_loss is not None:
            facts.insert(2, ("validation", f"{self._eval_loss:.4f}"))
        return facts

    def _table(self, record: StepRecord, now_s: float) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        table.add_row(self._progress)
        for name, value in self._facts(record, now_s):
            table.add_row(name, value)
        return table
