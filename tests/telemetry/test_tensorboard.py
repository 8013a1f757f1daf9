"""TensorBoard reads back what was written, and forgets the steps that a resumed run repeats."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.telemetry.test_record import layer_record, step_record

import anabranch
from anabranch.telemetry.tensorboard import TensorboardSink

SOURCES = str(Path(anabranch.__file__).parents[1])


def scalars(folder):
    """{tag: {step: value}} as TensorBoard shows it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_every_field_of_a_step_is_a_scalar(tmp_path):
    sink = TensorboardSink(tmp_path)
    sink.write(step_record(1))
    sink.write(step_record(2, eval_loss=3.5))
    sink.close()
    sink.close()
    shown = scalars(tmp_path)
    assert shown["train/loss"] == {1: 4.25, 2: 4.0}
    assert shown["train/eval_loss"] == {2: 3.5}
    assert shown["balance/max_mean_after"] == {1: 1.0625, 2: 1.0625}
    assert shown["energy/joules_estimate"] == {1: 2.5, 2: 2.5}
    assert shown["energy/joules_per_token_estimate"] == {step: pytest.approx(2.5 / 4096) for step in (1, 2)}
    names = {tag.split("/")[1].removesuffix("_estimate") for tag in shown}
    assert names == set(vars(step_record(1))) - {"step", "energy_source"} | {"joules_per_token"}


def test_layers_have_their_balance(tmp_path):
    sink = TensorboardSink(tmp_path)
    sink.write(step_record(1), [layer_record(3)])
    sink.close()
    shown = scalars(tmp_path)
    assert shown["layer_003/max_mean_before"] == {1: 1.5}
    assert shown["layer_003/max_mean_after"] == {1: 1.25}
    assert shown["layer_003/guests"] == {1: 2.0}


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path, monkeypatch):
    # TensorBoard reads files in the order of their names, which begin with the second they were opened in.
    for opened_s, steps, loss, resumed_step in [(1000.0, [1, 2, 3, 4], 9.0, None), (2000.0, [3], 5.0, 2)]:
        monkeypatch.setattr("time.time", lambda opened_s=opened_s: opened_s)
        sink = TensorboardSink(tmp_path, resumed_step=resumed_step)
        for step in steps:
            sink.write(step_record(step, loss=loss))
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 9.0), (2, 9.0), (3, 5.0)]


def test_writing_events_needs_neither_torch_nor_tensorflow():
    script = (
        "import sys, anabranch.telemetry.tensorboard;"
        "print([name for name in ('torch', 'tensorflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": SOURCES}
    )
    assert done.stdout.strip() == "[]", done.stderr
