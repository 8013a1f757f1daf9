"""The live view of a training run, on stderr: a table on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from anabranch.telemetry.record import ENERGY_TOLD, LayerRecord, StepRecord

# Off a terminal a line every so many seconds is enough to see that the run lives.
LINE_EVERY_S = 10.0


class RunDisplay:
    """A sink that shows the latest step. On a terminal it is live from its creation until `close`."""

    def __init__(self, title: str, steps: int, console: Console | None = None) -> None:
        self.title = title
        self.steps = steps
        self.console = console or Console(stderr=True)
        self._first: tuple[int, float] | None = None
        self._line_s: float | None = None
        self._eval_loss: float | None = None
        self._joules = 0.0
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(
                f"{title}: preparing data and model", console=self.console, refresh_per_second=4
            )
            self._live.start()

    def write(self, record: StepRecord, layers: Sequence[LayerRecord] = ()) -> None:
        now_s = time.monotonic()
        self._first = self._first or (record.step, now_s)
        self._joules += record.joules
        self._eval_loss = record.eval_loss if record.eval_loss is not None else self._eval_loss
        facts = self._facts(record, now_s)
        if self._live is not None:
            self._live.update(self._table(record, facts))
        elif self._line_s is None or now_s - self._line_s >= LINE_EVERY_S or record.step == self.steps:
            self._line_s = now_s
            line = ", ".join(f"{name} {value}" for name, value in facts.items())
            self.console.print(
                f"{self.title}: step {record.step}/{self.steps}, {line}",
                soft_wrap=True, highlight=False, markup=False,
            )  # fmt: skip

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _facts(self, record: StepRecord, now_s: float) -> dict[str, str]:
        evaluated = "" if self._eval_loss is None else f" (validation {self._eval_loss:.4f})"
        return {
            "loss": f"{record.loss:.4f}{evaluated}",
            "tokens/s": f"{record.tokens_per_s:,.0f}",
            "rank max/mean": f"{record.max_mean_before:.3f} -> {record.max_mean_after:.3f}",
            "guests": str(record.guests),
            "wire": f"{record.token_bytes / 1e6:,.2f} MB rows + {record.weight_bytes / 1e6:,.2f} MB weights",
            "energy": f"{self._joules:,.0f} J, {ENERGY_TOLD[record.energy_source]}",
            "ETA": self._eta(record.step, now_s),
        }

    def _eta(self, step: int, now_s: float) -> str:
        assert self._first is not None
        done = step - self._first[0]
        if not done:
            return "-"
        left_s = round((now_s - self._first[1]) / done * (self.steps - step))
        minutes, seconds = divmod(left_s, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"

    def _table(self, record: StepRecord, facts: dict[str, str]) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=self.steps, completed=record.step, width=40), f"{record.step}/{self.steps}"
        )
        table.add_row(self.title, bar)
        for name, value in facts.items():
            table.add_row(name, value)
        return table
