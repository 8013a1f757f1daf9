"""Real processes that die, hang or are interrupted: the run ends, says why, and can be gone on with.

A test waits for what a run has written, then strikes. None waits for a time to pass.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.training.starting import start

from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 250.0  # a busy machine takes a minute to start three processes

pytestmark = pytest.mark.timeout(900)


class Command:
    """`anabranch train` in a session of its own, so that a signal to its group reaches nobody else."""

    def __init__(self, options, temporary):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(temporary)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "anabranch", "train", *map(str, options)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def ranks(self):
        """Process ids of the ranks, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if self._started(folder):
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith(b"RANK=")}
        return [found[rank] for rank in sorted(found)]

    def _started(self, folder):
        parent = re.search(r"^PPid:\s+(\d+)$", (folder / "status").read_text(), re.MULTILINE)
        is_rank = b"anabranch.cli.rank" in (folder / "cmdline").read_bytes()
        return is_rank and parent is not None and int(parent[1]) == self.process.pid

    def end(self):
        """Exit code, stdout and the lines of stderr that are not the run's progress."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, [line for line in err.splitlines() if ": step " not in line]


@contextlib.contextmanager
def running(options, temporary):
    """The command, and no process of it afterwards, however the test ends."""
    command = Command(options, temporary)
    try:
        yield command
    finally:
        for pid in [*command.ranks(), command.process.pid] if command.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        command.process.communicate(timeout=PATIENCE_S)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def steps_done(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def temporary(tmp_path):
    """Where the processes put temporary files; nothing of ours may be left there."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    yield folder
    wait_for(lambda: not list(folder.glob("anabranch-*")))


@pytest.fixture
def endless(toy_options, out):
    """A run that goes on until something happens to it."""
    return [*toy_options, "--out", out, "--steps", 100_000, "--eval-every", 0]


def test_a_killed_rank_ends_the_run_with_its_reason(endless, out, temporary):
    with running(endless, temporary) as command:
        wait_for(lambda: steps_done(out) > 11)
        ranks = command.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        code, stdout, told = command.end()
    assert (code, stdout) == (1, "")
    assert told == ["error rank 1 was killed by SIGKILL; all ranks ended"]
    wait_for(lambda: gone(ranks))
    assert (out / "checkpoints" / "checkpoint-10" / "complete.json").exists()


def test_a_killed_launcher_leaves_no_rank_behind(endless, out, temporary):
    with running(endless, temporary) as command:
        wait_for(lambda: steps_done(out) > 0)
        ranks = command.ranks()
        assert len(ranks) == 2
        command.process.kill()
        wait_for(lambda: gone(ranks))


def train(settings):
    """On a rank of the pool: the losses of an uninterrupted run."""
    return list(start(RunConfig.from_dict(settings)).losses)


def losses(pool, toy_run, out, planner):
    config = RunConfig(**toy_run | {"steps": 40, "experts": AdaptiveSettings(planner), "out": str(out)})
    return pool.run(train, config.to_dict())[0]


@pytest.mark.full
def test_ctrl_c_in_the_second_of_two_runs_is_resumed_to_the_same_losses(
    ranks2, toy_run, toy_options, out, temporary, tmp_path
):
    options = [*toy_options, "--out", out, "--steps", 40, "--compare", "static"]
    second = out / "static"
    with running(options, temporary) as command:
        wait_for(lambda: steps_done(second) > 4)
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        code, stdout, (told,) = command.end()
    assert (code, stdout) == (130, "")
    stopped = re.fullmatch(rf"stopped after step (\d+) of 40, saved in {second}; go on with --resume", told)
    assert stopped is not None, told
    assert (second / "checkpoints" / f"checkpoint-{stopped[1]}" / "complete.json").exists()
    first_saved = (out / "summary.json").stat().st_mtime_ns
    with running([*options, "--resume"], temporary) as command:
        code, stdout, told = command.end()
    assert (code, told) == (0, [])  # no warning either
    assert (out / "summary.json").stat().st_mtime_ns == first_saved  # it was through, and is not run again
    assert "rank max/mean after" in stdout
    assert "their losses differ by at most" in stdout
    assert (second / "model" / "config.json").exists()
    resumed = json.loads((out / "comparison.json").read_text())
    assert [summary["planner"] for summary in resumed] == ["bounded", "static"]
    assert resumed[1]["losses"][0] == pytest.approx(resumed[0]["losses"][0], rel=1e-6)
    assert resumed[1]["losses"] == losses(ranks2, toy_run, tmp_path / "whole", "static")


@pytest.mark.full  # the same by SIGTERM, in the first run; ranks meet both in tests/training/test_runner.py
def test_a_terminated_run_is_resumed_to_the_same_losses(
    ranks2, toy_run, toy_options, out, temporary, tmp_path
):
    options = [*toy_options, "--out", out, "--steps", 40, "--json"]
    with running(options, temporary) as command:
        wait_for(lambda: steps_done(out) > 4)
        command.process.terminate()
        code, stdout, (told,) = command.end()
    assert (code, stdout) == (130, "")
    assert told.endswith(f"of 40, saved in {out}; go on with --resume")
    with running([*options, "--resume"], temporary) as command:
        code, stdout, told = command.end()
    assert (code, told) == (0, [])
    assert json.loads(stdout)[0]["losses"] == losses(ranks2, toy_run, tmp_path / "whole", "bounded")


def test_an_interruption_before_the_first_step_writes_nothing(endless, out, temporary):
    with running(endless, temporary) as command:
        wait_for(lambda: len(command.ranks()) == 2 and all(map(imports_torch, command.ranks())))
        ranks = command.ranks()
        os.killpg(command.process.pid, signal.SIGINT)
        code, stdout, told = command.end()
    assert (code, stdout, told) == (130, "", ["interrupted"])
    wait_for(lambda: gone(ranks))
    assert [path.name for path in out.parent.iterdir()] == ["tmp"]


def imports_torch(pid):
    """Past its first milliseconds, in which Python itself would print where it was interrupted."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.full  # the agent gives a rank that does not answer its SIGTERM 30 s
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(endless, out, temporary):
    with running([*endless, "--timeout-s", 15], temporary) as command:
        wait_for(lambda: steps_done(out) > 0)
        ranks = command.ranks()
        os.kill(ranks[1], signal.SIGSTOP)
        code, stdout, told = command.end()
    assert (code, stdout) == (1, "")
    reason = (
        "error timeout_s: rank 0 waited 15 s for another one, which hangs or is stopped; all ended. "
        "Raise timeout_s where a rank may take longer"
    )
    assert told == [reason]
    wait_for(lambda: gone(ranks))


@pytest.mark.full  # the same on a pool of ranks: tests/training/test_runner.py
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(
    ranks2, toy_run, toy_options, out, temporary, tmp_path
):
    """What such a run leaves: a folder that not every rank has written to, and so without its mark."""
    options = [*toy_options, "--out", out, "--steps", 40]
    with running(options, temporary) as command:
        wait_for(lambda: (out / "checkpoints" / "checkpoint-20" / "complete.json").exists())
        os.kill(command.ranks()[0], signal.SIGKILL)
        assert command.end()[0] == 1
    steps = [int(path.name.removeprefix("checkpoint-")) for path in (out / "checkpoints").iterdir()]
    newest = out / "checkpoints" / f"checkpoint-{max(steps)}"
    (newest / "complete.json").unlink(missing_ok=True)
    shutil.rmtree(newest / "optimizer_distributed", ignore_errors=True)
    with running([*options, "--resume", "--json"], temporary) as command:
        code, stdout, told = command.end()
    assert (code, told) == (0, [])
    assert json.loads(stdout)[0]["losses"] == losses(ranks2, toy_run, tmp_path / "whole", "bounded")
