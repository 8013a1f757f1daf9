"""docs/generate.md tells the truth: its program runs, its options exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from anabranch.cli.main import app
from anabranch.training.tokens import load_or_train_tokenizer

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "generate.md").read_text()


@pytest.fixture
def here(tmp_path: Path, toy_text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and prompts where the text has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    folder = Path("runs/train/model")
    tokenizer = load_or_train_tokenizer([toy_text.read_text()], 400, tmp_path / "cache")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **sizes, **heads, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Path("prompts.txt").write_text("import re\n")
    return tmp_path


def test_the_program_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (here / "program.py").write_text(block)
    runpy.run_path("program.py")
    said = capsys.readouterr().out
    assert len(re.findall(r" -\d+\.\d+$", said, flags=re.MULTILINE)) == 4


COMMANDS = re.findall(r"^anabranch (generate .*)$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(here: Path, command: str) -> None:
    mine = command.replace("MODEL", "runs/train/model").replace("/fast/disk", str(here / "disk"))
    result = CliRunner().invoke(app, [*shlex.split(mine), "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    samples = int(re.findall(r"--samples (\d+)", mine)[0]) if "--samples" in mine else 1
    assert len(Path("samples.jsonl").read_text().splitlines()) == samples


def test_the_options_exist() -> None:
    assert len(COMMANDS) == 3
    said = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
    assert [option for option in re.findall(r"`(--[a-z-]+)", TEXT) if option not in said] == []
