"""JSON lines: whole or absent, and going on after the resumed step."""

import json
import os
from dataclasses import asdict

import pytest
from tests.telemetry.test_record import layer_record, step_record

from anabranch.errors import CheckpointError
from anabranch.telemetry.jsonl import JsonlSink


def run(path, steps, **opening):
    sink = JsonlSink(path, **opening)
    for step in steps:
        sink.write(step_record(step))
    sink.close()
    return path


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_a_step_record(tmp_path):
    path = run(tmp_path / "new" / "metrics.jsonl", [1, 2])
    assert json.loads(path.read_text().splitlines()[1]) == asdict(step_record(2)) | {
        "joules_per_token": 2.5 / 4096
    }


def test_layers_are_part_of_the_line(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(step_record(1), [layer_record(3), layer_record(5, fits=False)])
    sink.close()
    layers = json.loads(sink.path.read_text())["layers"]
    assert [(layer["layer"], layer["fits"]) for layer in layers] == [(3, True), (5, False)]
    assert layers[0] == layer_record(3)._asdict()


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(step_record(1))
    assert steps_in(sink.path) == [1]
    sink.close()
    sink.close()


def test_what_json_cannot_express_is_null(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(step_record(1, loss=float("nan"), grad_norm=float("inf")))
    sink.close()
    fields = json.loads(sink.path.read_text(), parse_constant=pytest.fail)
    assert (fields["loss"], fields["grad_norm"]) == (None, None)


def test_resuming_drops_the_lines_of_later_steps(tmp_path):
    path = run(tmp_path / "metrics.jsonl", range(1, 8))
    assert steps_in(run(path, [5, 6], resumed_step=4)) == [1, 2, 3, 4, 5, 6]


def test_resuming_drops_the_half_line_of_a_killed_run(tmp_path):
    path = run(tmp_path / "metrics.jsonl", [1, 2])
    path.write_text(path.read_text()[:-9])
    assert steps_in(run(path, [3], resumed_step=2)) == [1, 3]


def test_resuming_without_a_file_starts_one(tmp_path):
    assert steps_in(run(tmp_path / "metrics.jsonl", [5], resumed_step=4)) == [5]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = run(tmp_path / "metrics.jsonl", [1, 2, 3])
    assert steps_in(run(path, [1])) == [1]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}'])
def test_resuming_onto_another_file_is_refused_and_leaves_it(tmp_path, line):
    path = run(tmp_path / "metrics.jsonl", [1])
    content = path.read_text() + line + "\n"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"resume: .*metrics\.jsonl, line 2, is not a step record"):
        JsonlSink(path, resumed_step=1)
    assert path.read_text() == content


class FullDisk:
    """Stands in for the open file: takes some bytes of each write, then reports it in its own way."""

    def __init__(self, file, raises):
        self.file, self.raises = file, raises

    def write(self, line):
        taken = self.file.write(line[:20])
        if self.raises:
            raise OSError("no space left on device")
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("raises", [True, False])
def test_a_line_that_fails_half_way_is_taken_back(tmp_path, raises):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(step_record(1))
    sink._file = FullDisk(sink._file, raises)
    with pytest.raises(OSError, match=r"no space left|half a line"):
        sink.write(step_record(2))
    sink.close()
    assert steps_in(sink.path) == [1]
