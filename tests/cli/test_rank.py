"""One rank of a job: what it leaves in the job's folder, and how it ends."""

import json
import os
import signal
import sys
import threading
from types import ModuleType

import pytest

from anabranch.cli import rank
from anabranch.errors import DataError


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Carries out a function as the job of a rank; what is in the folder, and the exit code."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def end(code):
        raise Ended(code)

    def carry_out(number, action):
        jobs = ModuleType("anabranch.cli.jobs")
        jobs.carry_out = lambda name, settings: action(name, settings)
        monkeypatch.setitem(sys.modules, "anabranch.cli.jobs", jobs)
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setattr(os, "_exit", end)
        monkeypatch.setattr(threading.Thread, "start", lambda thread: None)  # it would end this process
        request = {"job": "train", "settings": {"x": 1}, "launcher": os.getppid()}
        (tmp_path / "job.json").write_text(json.dumps(request))
        try:
            rank.main(tmp_path / "job.json")
            code = 0
        except Ended as ended:
            (code,) = ended.args
        return code, {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}

    yield carry_out
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_rank_0_leaves_the_result(job):
    code, left = job(0, lambda name, settings: {"name": name, **settings})
    assert code == 0
    assert left["result.json"] == {"name": "train", "x": 1}


def test_other_ranks_leave_nothing(job):
    code, left = job(1, lambda name, settings: {})
    assert code == 0
    assert left.keys() == {"job.json"}


def test_a_mistake_of_the_user_is_left_by_its_rank(job):
    def unreadable(name, settings):
        raise DataError("unreadable; give another", setting="data")

    code, left = job(3, unreadable)
    assert code == 2
    assert left.keys() == {"job.json", "error-0003.json"}
    assert left["error-0003.json"] == {"message": "data: unreadable; give another"}


def test_a_crash_is_left_with_its_traceback(job, capsys):
    def crash(name, settings):
        raise KeyError("two\nlines")

    code, left = job(1, crash)
    assert code == 1
    found = left["crash-0001.json"]
    assert (found["rank"], found["error"]) == (1, r"KeyError: 'two\nlines'")
    assert found["traceback"].startswith("Traceback")
    assert capsys.readouterr().err == ""


def test_an_interruption_leaves_nothing(job):
    """SIGTERM as well as SIGINT."""
    code, left = job(0, lambda name, settings: os.kill(os.getpid(), signal.SIGTERM))
    assert code == 130
    assert left.keys() == {"job.json"}


def test_a_rank_ends_with_its_launcher(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    folder = tmp_path / "job"
    folder.mkdir()
    rank._end_with(os.getppid() + 1, folder)
    assert ended == [1]
    assert not folder.exists()
