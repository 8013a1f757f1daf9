"""The command line as a module, and its commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.main import app

SOURCES = Path(__file__).resolve().parents[2] / "src"


def test_python_m_anabranch_is_the_command_line():
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    ran = subprocess.run(
        [sys.executable, "-m", "anabranch", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    for command in ("train", "trace", "bench"):
        assert command in ran.stdout


@pytest.mark.parametrize("command", [["train"], ["trace"], ["bench", "planner"], ["bench", "balance"]])
def test_every_option_has_a_word_of_help(command):
    text = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = [line for line in text.splitlines() if line.strip("│ ").startswith("--")]
    assert len(options) > 2
    for line in options:
        words = line.strip("│ ").split("  ")
        assert len([word for word in words if word.strip()]) >= 2, line


def test_the_command_line_itself_does_without_torch():
    code = "import sys; import anabranch.cli.main, anabranch.cli.fail; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "False\n", ran.stderr
