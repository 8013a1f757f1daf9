"""How a command ends: the line, the exit code, and who speaks."""

import errno
import signal

import pytest
import typer

from anabranch.cli import fail
from anabranch.cli.fail import RankDiedError, fails_clearly
from anabranch.errors import ConfigError


def ended(error):
    """The exit code of a command that raises."""

    @fails_clearly
    def command():
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    return caught.value.exit_code


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    assert ended(ConfigError("two\n  lines; use one", setting="steps")) == 2
    assert capsys.readouterr() == ("", "error steps: two lines; use one\n")


def test_a_rank_that_died_is_no_mistake_of_the_user(capsys):
    assert ended(RankDiedError("rank 1 was killed")) == 1
    assert capsys.readouterr().err == "error rank 1 was killed\n"


def test_an_interruption_is_130(capsys):
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_file_that_cannot_be_used_is_named_in_one_line(capsys, tmp_path):
    for found in (tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(OSError) as caught:
            found.write_text("")
        assert ended(caught.value) == 2
        assert capsys.readouterr().err == f"error {found}: {caught.value.strerror}\n"
    with pytest.raises(ConnectionError):  # not of a file
        ended(ConnectionResetError(errno.ECONNRESET, "gone"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_asked_to_end_unwinds(number):
    unwound = []

    @fails_clearly
    def command():
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(number)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as caught:
            command()
        assert caught.value.code == 128 + number
        assert unwound == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_rank_is_ended_by_its_agent_at_once(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    assert fails_clearly(lambda: signal.getsignal(signal.SIGTERM))() is before


def test_what_nobody_expected_keeps_its_traceback():
    @fails_clearly
    def command():
        raise KeyError("x")

    with pytest.raises(KeyError):
        command()


def test_a_result_is_returned():
    assert fails_clearly(lambda x: x + 1)(2) == 3


def test_under_torchrun_rank_0_alone_speaks_and_the_others_let_it(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(fail.time, "sleep", slept.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, said in (("1", ""), ("0", "error a: b\n")):
        monkeypatch.setenv("RANK", rank)
        assert ended(ConfigError("b", setting="a")) == 2
        assert capsys.readouterr().err == said
    assert slept == [fail.SPEAKER_S]


def test_a_rank_in_the_environment_of_no_torchrun_silences_nobody(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert ended(ConfigError("b", setting="a")) == 2
    assert capsys.readouterr().err == "error a: b\n"
