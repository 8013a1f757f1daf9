"""The live view: everything a user wants to see of a run, on a terminal and off it."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from anabranch.cli import display
from anabranch.cli.display import RunDisplay
from anabranch.telemetry.record import StepRecord

RECORD = StepRecord(
    step=1, loss=5.4321, tokens=4096, step_ms=100.0, tokens_per_s=40960.0, max_mean_before=1.4567,
    max_mean_after=1.0321, guests=7, token_bytes=12_300_000, weight_bytes=4_500_000, plan_ms=1.0, joules=2.0,
    energy_source="estimate", learning_rate=1e-3, grad_norm=1.0,
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A time that passes only when told; in seconds."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def terminal():
    return Console(file=io.StringIO(), record=True, force_terminal=True, width=100)


def shown(console):
    """The last frame, as text."""
    return console.export_text(clear=True).split("\n\n")[-1]


def test_a_terminal_shows_all_of_the_latest_step(clock):
    console = terminal()
    view = RunDisplay("bounded", 20, console)
    view.write(RECORD)
    clock[0] += 2.0
    view.write(replace(RECORD, step=2, loss=4.5, eval_loss=4.8765))
    clock[0] += 2.0
    view.write(replace(RECORD, step=3, loss=4.0))
    view.close()
    frame = shown(console)
    for part in (
        "bounded", "3/20", "━", "4.0000 (validation 4.8765)", "40,960", "1.457 -> 1.032", "guests", "7",
        "12.30 MB rows + 4.50 MB weights", "6 J, estimated from CPU seconds", "0:00:34",
    ):  # fmt: skip
        assert part in frame, part
    assert "5.4321" not in frame


def test_a_terminal_shows_that_the_run_is_being_prepared():
    console = terminal()
    view = RunDisplay("bounded", 20, console)
    view.close()
    assert "bounded: preparing data and model" in console.export_text()


def test_no_cursor_stays_hidden_when_a_run_fails_to_start():
    console = terminal()
    RunDisplay("bounded", 20, console).close()
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")


def test_off_a_terminal_a_line_now_and_then(clock):
    console = Console(file=io.StringIO(), width=40)
    view = RunDisplay("exact", 30, console)
    for step in range(1, 31):
        view.write(replace(RECORD, step=step, energy_source="rapl"))
        clock[0] += 1.0
    view.close()
    lines = console.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"exact: step {n}/30" for n in (1, 11, 21, 30)]
    assert lines[1].endswith("energy 22 J, measured by RAPL, ETA 0:00:19")
    assert "rank max/mean 1.457 -> 1.032" in lines[0]


@pytest.mark.parametrize(
    ("left", "eta"), [(1, "0:00:02"), (1800, "1:00:00"), (7201, "4:00:02"), (0, "0:00:00")]
)
def test_what_is_left_is_told_in_hours_minutes_and_seconds(clock, left, eta):
    """Ten steps took twenty seconds."""
    console = Console(file=io.StringIO())
    view = RunDisplay("exact", 11 + left, console)
    view.write(RECORD)
    clock[0] += 20.0
    view.write(replace(RECORD, step=11))
    assert console.file.getvalue().splitlines()[-1].endswith(f"ETA {eta}")
