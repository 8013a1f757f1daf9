"""The live view of a generation, on stderr, and its report."""

import time
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anabranch.cli.display import LINE_EVERY_S
from anabranch.telemetry.record import ENERGY_TOLD


class GenerationDisplay:
    """A bar on a terminal, a line now and then elsewhere, until `close`."""

    def __init__(self, samples: int) -> None:
        self._samples, self._start_s = samples, time.monotonic()
        self._line_s = self._start_s
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            speed = TextColumn("{task.fields[speed]:,.0f} tokens/s")
            self._bar = Progress(
                TextColumn("samples"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn(),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("samples", total=samples, speed=0.0)
            self._bar.start()

    def update(self, left: int, tokens: int) -> None:
        """So many samples are left, and so many tokens were generated."""
        now_s = time.monotonic()
        speed = tokens / max(now_s - self._start_s, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._samples - left, speed=speed)
        elif left == 0 or now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            typer.echo(f"samples: {self._samples - left}/{self._samples}, {speed:,.0f} tokens/s", err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_report(report: dict[str, Any], out: str) -> None:
    """The report in a few lines."""
    typer.echo(
        f"{report['samples']} samples, {report['new_tokens']:,} tokens in {report['wall_s']:.1f} s "
        f"({report['tokens_per_s']:,.0f} tokens/s, step {report['step']}), in {out}"
    )
    if report["cpu_s_per_token"] is not None:
        typer.echo(f"{1e3 * report['cpu_s_per_token']:.3g} ms of CPU a token")
    if report["joules_per_token"] is not None:
        told = ENERGY_TOLD[report["energy_source"]]
        typer.echo(f"{report['joules_per_token']:.3g} joules a token, {told}")
    if report["guessed_tokens"]:
        typer.echo(f"{report['right_guesses']} of {report['guessed_tokens']} guessed tokens were right")
    if store := report["expert_store"]:
        typer.echo(
            f"{store['slots']} of {store['experts']} experts in memory, {store['hit_rate']:.0%} of those needed "
            f"were there, {store['bytes_read'] / (1 << 20):,.0f} MiB read"
        )
    if report["votes"]:
        typer.echo(
            f"{report['votes']} votes: {report['cancelled_samples']} samples cancelled, "
            f"some {report['saved_tokens']:,.0f} tokens saved"
        )
    if report["failed_prompts"]:
        typer.echo(
            f"{report['failed_prompts']} prompts failed, the first: {report['first_failure']}", err=True
        )
