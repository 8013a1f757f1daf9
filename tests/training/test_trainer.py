"""The Trainer of one plain process: its checkpoints resume exactly, also past the end of the text."""

import os
import signal

import pytest
from tests.training.starting import start

from anabranch.training.checkpoints import complete_checkpoints
from anabranch.training.config import RunConfig


class Interrupts:
    """A watcher that interrupts this process once a step is written."""

    def __init__(self, step):
        self.step = step

    def write(self, record, layers=()):
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def settings(toy_run, tmp_path):
    """On a text of six steps: a run of fifteen goes through it twice and a half."""
    text = tmp_path / "text.txt"
    with open(toy_run["data"][0]) as file:
        text.write_text(file.read(2400))
    short = {"ranks": 1, "steps": 15, "save_every": 4, "eval_every": 0}
    return toy_run | short | {"data": (str(text),), "out": str(tmp_path / "whole")}


def test_checkpoints_resume_exactly_past_the_end_of_the_text(settings, tmp_path):
    whole = start(RunConfig(**settings))
    assert len(whole.losses) == 15
    # The second time through, the same windows come in the same order: the model knows them better.
    assert whole.losses[6] != whole.losses[0]
    parts = settings | {"out": str(tmp_path / "parts")}
    assert start(RunConfig(**parts), [Interrupts(4)]).steps == 5
    assert start(RunConfig(**parts, resume=True), [Interrupts(9)]).steps == 10
    resumed = start(RunConfig(**parts, resume=True))
    assert resumed.losses == whole.losses
    assert resumed.eval_loss == whole.eval_loss


def test_the_two_newest_checkpoints_are_kept_complete(settings, tmp_path):
    start(RunConfig(**settings))
    folder = tmp_path / "whole" / "checkpoints"
    kept = ["checkpoint-12", "checkpoint-15"]
    assert [path.name for path in complete_checkpoints(folder)] == kept
    assert sorted(path.name for path in folder.iterdir()) == kept


def test_a_run_saves_nothing_unasked(settings, tmp_path):
    start(RunConfig(**settings | {"save_every": 0, "steps": 2}))
    assert not list((tmp_path / "whole").glob("checkpoints/*"))


def test_an_interruption_saves_even_so(settings, tmp_path):
    assert start(RunConfig(**settings | {"save_every": 0}), [Interrupts(1)]).stopped_early
    assert [path.name for path in complete_checkpoints(tmp_path / "whole" / "checkpoints")] == [
        "checkpoint-2"
    ]
