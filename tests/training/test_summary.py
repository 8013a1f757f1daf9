"""What a run came to, from its step records; and the records back from their file."""

import json
import math
from dataclasses import replace

import pytest

from anabranch.errors import CheckpointError
from anabranch.telemetry.jsonl import JsonlSink
from anabranch.telemetry.record import LayerRecord, StepRecord
from anabranch.training.summary import read_records, summarise

RECORD = StepRecord(
    step=1, loss=6.0, tokens=256, step_ms=50.0, tokens_per_s=5120.0, max_mean_before=1.5, max_mean_after=1.0,
    guests=4, token_bytes=3_000_000, weight_bytes=1_000_000, plan_ms=1.0, joules=2.0,
    energy_source="estimate", learning_rate=1e-3, grad_norm=1.0,
)  # fmt: skip
LAYER = LayerRecord(3, 9, 8, 7.5, 1, 10, 20, 0.1, True)


def records(count):
    """Steps of which the first two are a hundred times slower."""
    return [
        replace(RECORD, step=n, loss=6.0 / n, step_ms=5000.0 if n < 3 else 10.0 * n)
        for n in range(1, count + 1)
    ]


def test_warm_up_counts_for_losses_but_not_for_speed():
    summary = summarise(records(5), planner="exact", stopped_early=False, eval_loss=1.5)
    assert summary.losses == (6.0, 3.0, 2.0, 1.5, 1.2)
    assert (summary.first_loss, summary.last_loss, summary.eval_loss) == (6.0, 1.2, 1.5)
    assert (summary.steps, summary.step_ms_median) == (5, 40.0)
    assert (summary.token_mb_per_step, summary.weight_mb_per_step, summary.guests_per_step) == (3.0, 1.0, 4.0)


def test_a_run_of_two_steps_has_a_speed_too():
    assert summarise(records(2), planner="exact", stopped_early=True, eval_loss=None).step_ms_median == 5000.0


def test_a_diverged_loss_is_null_in_json():
    diverged = [replace(record, loss=math.inf) for record in records(3)]
    summary = summarise(diverged, planner="exact", stopped_early=False, eval_loss=math.nan).to_dict()
    assert json.loads(json.dumps(summary, allow_nan=False))["losses"] == [None] * 3
    assert summary["first_loss"] is summary["eval_loss"] is None


@pytest.fixture
def metrics(tmp_path):
    """A file of five steps; the loss of the last one is not finite."""
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for record in records(5):
        sink.write(replace(record, loss=math.inf) if record.step == 5 else record, [LAYER])
    sink.close()
    return sink.path


def test_records_come_back_from_their_file(metrics):
    assert read_records(metrics, 4) == records(4)
    assert math.isnan(read_records(metrics, 5)[-1].loss)
    assert read_records(metrics, 5)[-1].eval_loss is None
    assert read_records(metrics, 0) == []


def test_what_a_killed_run_left_behind_is_not_read(metrics):
    with metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    assert len(read_records(metrics, 5)) == 5
    with pytest.raises(CheckpointError, match=r"^resume: .*metrics.jsonl is damaged .*--overwrite"):
        read_records(metrics, 6)


@pytest.mark.parametrize("spoil", [lambda lines: lines[1:], lambda lines: [*lines[:2], "7", *lines[3:]]])
def test_a_missing_or_foreign_line_is_told(metrics, spoil):
    metrics.write_text("\n".join(spoil(metrics.read_text().splitlines())))
    with pytest.raises(CheckpointError, match=r"^resume: .*metrics.jsonl is damaged"):
        read_records(metrics, 4)


def test_a_lost_file_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="does not hold steps 1 to 3"):
        read_records(tmp_path / "metrics.jsonl", 3)
