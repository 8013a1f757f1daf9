"""`anabranch lab`: refuses what cannot be before anything is made, and passes on what came back."""

import json
import signal
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from anabranch.cli import lab as command
from anabranch.cli.main import app
from anabranch.errors import AnabranchError
from anabranch.lab.check import Finding
from anabranch.lab.ownership import Cleaned


class FakeLab:
    """A cluster of nothing; `made` keeps what the command line asked for."""

    made: ClassVar[list[tuple]]
    status = 0

    def __init__(self, spec):
        self.spec = spec

    def __enter__(self):
        self.made.append(("lab", str(self.spec)))
        return self

    def __exit__(self, *_):
        self.made.append(("gone",))

    def run(self, words, *, timeout_s):
        self.made.append((words, timeout_s))
        return self.status


@pytest.fixture
def fake(monkeypatch):
    Lab = type("Lab", (FakeLab,), {"made": []})
    monkeypatch.setattr(command, "Lab", Lab)
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    return Lab


def invoke(*words):
    return CliRunner().invoke(app, ["lab", *map(str, words)], catch_exceptions=False)


def test_the_shape_and_the_words_of_the_command_arrive_and_its_status_returns(fake):
    fake.status = 3
    shape = ("--nodes", 4, "--ranks-per-node", 1, "--inter", "0.2gbit", "--intra", "5gbit", "--cpu", 0.45)
    ran = invoke("run", *shape, "--timeout", 9, "--", "env", "--nodes", "7", "-i")
    assert ran.exit_code == 3
    assert fake.made == [
        ("lab", "4x1 inter=200mbit intra=5gbit cpu=0.45"),
        (["env", "--nodes", "7", "-i"], 9.0),
        ("gone",),
    ]
    assert ran.stderr == ""


def test_ranks_that_would_not_be_equal_devices_are_told(fake):
    ran = invoke("run", "--cpu", 0.9, "--", "env")
    assert ran.exit_code == 0
    assert "warning: 4 ranks of 0.9 cores want 3.6 of 2" in ran.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--inter", "fast"), "inter"),
        (("--intra", "0.1mbit"), "intra"),
        (("--nodes", 0), "nodes"),
        (("--cpu", 0.01), "cpu"),
    ],
)
def test_a_wrong_shape_is_refused_before_anything_is_made(fake, words, named):
    for ran in (invoke("run", *words, "--", "env"), invoke("check", *words)):
        assert ran.exit_code == 2
        assert ran.stderr.startswith(f"error {named}: ")
    assert not fake.made


def test_an_unknown_program_and_an_outer_torchrun_are_refused(fake, monkeypatch):
    ran = invoke("run", "--", "anabranch-no-such-program")
    assert (ran.exit_code, ran.stderr.split(":")[0]) == (2, "error command")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    monkeypatch.setenv("RANK", "0")
    ran = invoke("run", "--", "env")
    assert (ran.exit_code, ran.stderr.split(":")[0]) == (2, "error lab")
    assert not fake.made


def test_a_machine_that_cannot_hold_a_lab_says_why(fake, monkeypatch):
    def refuse(self):
        raise AnabranchError("which takes root; run it with sudo", setting="lab")

    monkeypatch.setattr(fake, "__enter__", refuse)
    monkeypatch.setattr(command, "available", lambda: "which takes root; run it with sudo")
    for words in (("run", "--", "env"), ("check",), ("clean",)):
        ran = invoke(*words)
        assert (ran.exit_code, ran.stderr) == (2, "error lab: which takes root; run it with sudo\n")


def test_sigterm_takes_the_lab_down_before_the_process_ends(fake, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(fake, "run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert invoke("run", "--", "env").exit_code == 143
    assert fake.made[-1] == ("gone",)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_that_nohup_hides_stays_hidden(fake, monkeypatch):
    monkeypatch.setattr(fake, "run", lambda *_, **__: signal.raise_signal(signal.SIGHUP) or 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert invoke("run", "--", "env").exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert invoke("run", "--", "env").exit_code == 129
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("netem", "words"), [(True, "has netem"), (False, "has no netem")])
def test_findings_are_shown_and_kept_with_the_machine(fake, monkeypatch, tmp_path, netem, words):
    findings = [
        Finding("inter", "0>1", "mbit", 200.0, 198.5, 99.2),
        Finding("cpu", "rank 0", "cores", None, 0.97, None),
    ]
    monkeypatch.setattr(command, "check", lambda lab: iter(findings))
    monkeypatch.setattr(command, "has_netem", lambda: netem)
    ran = invoke("check", "--inter", "200mbit", "--json", tmp_path / "new" / "check.json")
    assert ran.exit_code == 0
    assert words in ran.stdout
    assert all(text in ran.stdout for text in ("0>1", "198.5", "99.2", "rank 0", "0.97"))
    kept = json.loads((tmp_path / "new" / "check.json").read_text())
    assert kept["rows"] == [finding._asdict() for finding in findings]
    assert kept["machine"]["lab"] == "2x2 inter=200mbit intra=none cpu=none"
    assert kept["machine"]["kernel_has_netem"] is netem


def test_clean_tells_what_it_removed_and_what_it_left(monkeypatch):
    monkeypatch.setattr(command, "available", lambda: None)
    monkeypatch.setattr(command, "clean", lambda: Cleaned(["anab1-0"], ["anab2-0"]))
    ran = invoke("clean")
    assert (ran.exit_code, ran.stdout) == (0, "removed anab1-0\nleft anab2-0: its owner runs\n")
    monkeypatch.setattr(command, "clean", lambda: Cleaned([], []))
    assert invoke("clean").stdout == "nothing to remove\n"


@pytest.mark.parametrize("name", ["run", "check"])
def test_every_option_has_a_word_of_help(name):
    text = CliRunner().invoke(app, ["lab", name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = [line for line in text.splitlines() if line.strip("│ ").startswith("--")]
    assert len(options) > 4
    for option in options:
        assert len([word for word in option.strip("│ ").split("  ") if word.strip()]) >= 2, option
