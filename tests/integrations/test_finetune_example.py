"""examples/finetune_trainer.py does what it says, under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoTokenizer

from anabranch.training.origin import find_origin
from anabranch.training.tokens import load_or_train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_a_plain_trainer_finetunes_a_local_checkpoint(toy_model, toy_text, tmp_path):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    find_origin(str(toy_model), None).write_initial(checkpoint, seed=0)
    load_or_train_tokenizer([toy_text.read_text()], 320, tmp_path / "cache").save_pretrained(checkpoint)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *(ROOT / "examples" / "finetune_trainer.py", checkpoint, toy_text, out),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    logged = [line for line in ran.stdout.splitlines() if "'loss'" in line]
    assert len(logged) == 4  # every fifth of 20 steps, by rank 0 alone
    assert all("'balance/max_mean_after'" in line for line in logged)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    assert before.keys() <= after.keys()  # the tied head may be written too
    assert any((before[name] != after[name]).any() for name in before if "experts" in name)
    assert len(AutoTokenizer.from_pretrained(out)) == 320


def test_the_example_stays_an_example():
    assert len((ROOT / "examples" / "finetune_trainer.py").read_text().splitlines()) < 60
