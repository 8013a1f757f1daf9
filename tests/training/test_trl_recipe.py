"""TRL's trainer takes our engine's samples, where it is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from recipes import trl_grpo
from recipes.arithmetic import model_config, tokenizer
from transformers import AutoModelForCausalLM


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # TRL's own
def test_a_step_of_trls_trainer_on_samples_of_our_engine(tmp_path: Path, monkeypatch, capsys) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model_config()).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(trl_grpo, "PROMPTS", 4)
    trl_grpo.main(tmp_path / "model", steps=2, out=tmp_path / "trl")
    assert "solved, step by step: 0.000 0.000" in capsys.readouterr().out
