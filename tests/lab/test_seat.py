"""A rank's seat, by itself: when it ends, and what it records."""

import json
import os
import subprocess
import sys
import time

import pytest

from anabranch.lab import seat

# The seat itself, run as its agent runs it.
SEAT = [sys.executable, "-P", seat.__file__]


@pytest.fixture
def start(tmp_path):
    """Start the seat of rank 0 of two, with `command`."""
    (tmp_path / "rank0").mkdir()
    started = []

    def begin(*command):
        (tmp_path / seat.COMMAND).write_text(json.dumps(command))
        (tmp_path / "records").mkdir()
        (tmp_path / seat.COMMAND).rename(tmp_path / "records" / seat.COMMAND)
        env = dict(os.environ) | {"RANK": "0", "WORLD_SIZE": "2"}
        started.append(subprocess.Popen([*SEAT, str(tmp_path), str(tmp_path / "records")], env=env))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def recorded(folder):
    """The exit status in the record of rank 0, once it is there."""
    record = folder / "records" / "rank0"
    deadline_s = time.monotonic() + 30
    while not record.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return int(record.read_text().split()[1])


def test_a_rank_that_ends_well_waits_for_the_others(start, tmp_path):
    process = start("true")
    assert recorded(tmp_path) == 0
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3 * seat.POLL_S)
    (tmp_path / "records" / "rank1").write_text("1 0")
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("command", "status"),
    [(["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137), (["anabranch-none"], 127), (["/"], 126)],
)
def test_a_failure_is_recorded_and_kept_from_the_agent(start, tmp_path, command, status):
    process = start(*command)
    assert recorded(tmp_path) == status
    (tmp_path / "records" / "rank1").write_text("1 0")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3 * seat.POLL_S)
