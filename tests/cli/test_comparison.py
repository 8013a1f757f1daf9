"""Summaries as a table, one run or several side by side."""

import io

from rich.console import Console

from anabranch.cli.comparison import print_summaries

FIRST = {
    "planner": "bounded", "steps": 3, "stopped_early": False, "first_loss": 5.7, "last_loss": 4.0,
    "eval_loss": 4.1234, "step_ms_median": 50.0, "tokens_per_s": 5120.0, "max_mean_before": 1.5,
    "max_mean_after": 1.05, "guests_per_step": 2.0, "token_mb_per_step": 1.0, "weight_mb_per_step": 0.5,
    "joules_per_step": 0.4, "joules_per_token": 1e-3, "energy_source": "estimate", "losses": [5.7, 5.0, 4.0],
}  # fmt: skip
SECOND = FIRST | {
    "planner": "static", "step_ms_median": 60.0, "max_mean_after": 1.5, "losses": [5.7, 5.0, 4.004],
}  # fmt: skip


def printed(*summaries):
    console = Console(file=io.StringIO(), width=90)
    print_summaries(list(summaries), "runs/x [bold]", console)
    return console.file.getvalue()


def row(text, label):
    line = next(line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_one_run_is_a_column():
    text = printed(FIRST)
    assert row(text, "validation loss") == ["validation loss", "4.1234"]
    assert row(text, "tokens/s") == ["tokens/s, median", "5,120"]
    assert "joules estimated from CPU seconds; written to runs/x [bold]" in text
    assert "times the step" not in text


def test_two_runs_are_side_by_side_with_their_difference():
    text = printed(FIRST, SECOND)
    assert "the same data and weights" in text
    assert row(text, "rank max/mean after") == ["rank max/mean after", "1.050", "1.500"]
    told = "static takes 1.20 times the step of bounded; their losses differ by at most 1.0e-03, relatively"
    assert told in text


def test_what_is_missing_is_a_dash():
    assert row(printed(FIRST | {"eval_loss": None, "energy_source": "rapl"}), "validation")[1] == "-"
    assert "joules measured by RAPL" in printed(FIRST | {"energy_source": "rapl"})


def test_a_diverged_loss_is_left_out_of_the_difference():
    assert "differ by at most 1.4e-02" in printed(
        FIRST | {"losses": [5.7, 5.0, None]}, FIRST | {"losses": [5.7, 5.07, 4.0]}
    )
