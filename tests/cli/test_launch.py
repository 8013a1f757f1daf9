"""Starting ranks: their environment, and the first cause of a failure in one line."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from anabranch.cli import launch
from anabranch.cli.fail import RankDiedError
from anabranch.errors import AnabranchError

BEGAN_S = 1_800_000_000.0
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4"
WAITED = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv"


def failed(**exits):
    """What the agent saw: rank1=(exit code, seconds after the first event)."""
    failures = {
        int(rank.removeprefix("rank")): SimpleNamespace(exitcode=code, timestamp=int(BEGAN_S + after_s))
        for rank, (code, after_s) in exits.items()
    }
    return SimpleNamespace(failures=failures)


def crash(folder, rank, error, after_s=0.0):
    content = {
        "rank": rank,
        "time_s": BEGAN_S + after_s,
        "error": error,
        "traceback": f"Traceback of {rank}\n",
    }
    (folder / f"crash-{rank:04d}.json").write_text(json.dumps(content))


def reason(folder, error):
    return launch._reason(folder, error, 5)


def test_a_reported_mistake_is_the_reason_whatever_else_failed(tmp_path):
    for rank in (1, 3):
        (tmp_path / f"error-{rank:04d}.json").write_text(json.dumps({"message": f"data: of rank {rank}"}))
    crash(tmp_path, 0, LOST)
    found = reason(tmp_path, failed(rank0=(1, 0), rank1=(2, 0), rank2=(-9, 0)))
    assert type(found) is AnabranchError
    assert str(found) == "data: of rank 1"


def test_a_killed_rank_is_the_reason_not_those_that_lost_it(tmp_path, capsys):
    crash(tmp_path, 0, LOST, after_s=-0.1)
    found = reason(tmp_path, failed(rank0=(1, 0), rank1=(-signal.SIGKILL, 0)))
    assert isinstance(found, RankDiedError)
    assert str(found) == "rank 1 was killed by SIGKILL; all ranks ended"
    assert capsys.readouterr().err == ""


def test_ranks_that_the_agent_ended_are_not_the_reason(tmp_path, capsys):
    crash(tmp_path, 1, "KeyError: 'x'")
    ended = failed(rank1=(1, 0), rank0=(-signal.SIGTERM, 0), rank2=(-signal.SIGKILL, 30))
    assert str(reason(tmp_path, ended)) == "rank 1 crashed: KeyError: 'x'; its traceback is above"
    assert capsys.readouterr().err == "Traceback of 1\n"


def test_a_crash_is_the_reason_not_its_echo_on_other_ranks(tmp_path, capsys):
    crash(tmp_path, 0, LOST, after_s=-1)
    crash(tmp_path, 2, "ValueError: later", after_s=2)
    crash(tmp_path, 1, "KeyError: 'x'", after_s=1)
    found = reason(tmp_path, failed(rank0=(1, 0), rank1=(1, 0), rank2=(1, 0)))
    assert str(found) == "rank 1 crashed: KeyError: 'x'; its traceback is above"
    assert capsys.readouterr().err == "Traceback of 1\n"


def test_a_lab_s_ranks_leave_their_cause_likewise(tmp_path, capsys):
    assert launch.told_cause(tmp_path, 5) is None
    crash(tmp_path, 0, LOST, after_s=1)
    crash(tmp_path, 2, "KeyError: 'x'", after_s=2)
    found = launch.told_cause(tmp_path, 5)
    assert isinstance(found, RankDiedError) and "rank 2 crashed: KeyError: 'x'" in str(found)
    assert capsys.readouterr().err == "Traceback of 2\n"
    (tmp_path / "error-0001.json").write_text(json.dumps({"message": "data: of rank 1"}))
    assert str(launch.told_cause(tmp_path, 5)) == "data: of rank 1"


def test_a_vain_wait_names_the_setting(tmp_path, capsys):
    crash(tmp_path, 0, WAITED)
    found = reason(tmp_path, failed(rank0=(1, 0), rank1=(-signal.SIGKILL, 30)))
    assert isinstance(found, RankDiedError)
    assert found.setting == "timeout_s"
    assert "rank 0 waited 5 s for another one, which hangs or is stopped" in str(found)
    assert capsys.readouterr().err == ""


def test_a_vain_wait_in_a_lab_has_no_setting(tmp_path):
    crash(tmp_path, 0, WAITED)
    found = launch.told_cause(tmp_path, 1800)
    assert str(found) == "rank 0 waited 1800 s for another one, which hangs or is stopped; all ended"


def test_a_lost_rank_that_left_no_trace(tmp_path):
    crash(tmp_path, 0, LOST)
    assert str(reason(tmp_path, failed(rank0=(1, 0)))).startswith(
        "rank 0 lost the others (RuntimeError: [gloo"
    )


def test_a_rank_that_just_ended(tmp_path):
    assert str(reason(tmp_path, failed(rank1=(7, 0)))) == "rank 1 ended; all ranks ended"


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 2, "4"), (8, 3, "2"), (2, 4, "1"), (1, 1, "1")])
def test_ranks_share_the_cores_they_may_use(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert launch._rank_environment(ranks)["OMP_NUM_THREADS"] == threads


def test_what_the_user_has_set_stays_and_what_was_added_goes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    with launch._environment({"OMP_NUM_THREADS": "1", "MALLOC_TOP_PAD_": "5"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["MALLOC_TOP_PAD_"]) == ("7", "5")
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MALLOC_TOP_PAD_" not in os.environ
