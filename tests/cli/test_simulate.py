"""`anabranch simulate`: its table, its files, its complaints; without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.main import app

SOURCES = Path(__file__).resolve().parents[2] / "src"
COMMAND = ["simulate", "--model", "Qwen3-30B-A3B", "--cluster", "trn2.48xlarge:4"]


def run(*more: str):
    return CliRunner().invoke(app, [*COMMAND, *more], env={"COLUMNS": "200", "TERM": "dumb"})


def test_every_policy_is_simulated_and_written_down(tmp_path):
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    ran = run("--layout", "ep=16,global_batch=64", "--json", str(out), "--trace", str(trace))
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text())
    of = {one["policy"]: one for one in found["policies"]}
    assert list(of) == ["static", "exact", "bounded", "least_loaded", "periodic_replication", "rehome"]
    assert all(name in ran.output for name in of)
    assert of["exact"]["throughput"] > of["static"]["throughput"]
    # New homes balance without a guest, but no micro-batch exactly.
    assert 1.0 < of["rehome"]["max_mean"] < of["static"]["max_mean"]
    assert all(
        (layer["moved"] > 0) == (name == "rehome") for name, one in of.items() for layer in one["layers"]
    )
    assert of["static"]["step_s"] * of["static"]["throughput"] == pytest.approx(found["balanced_step_s"])
    for one in of.values():
        for layer in one["layers"]:
            assert sum(layer["rows"]) == pytest.approx(16 * found["tokens_per_rank"] * 8, rel=1e-3)
            assert (layer["guest_bytes"] > 0) == (layer["guests"] > 0)
    assert found["replayed_step_s"] == pytest.approx(of["static"]["step_s"], rel=0.02)
    assert json.loads(trace.read_text())["traceEvents"]


def test_the_users_own_popularity_is_taken(tmp_path):
    file, out = tmp_path / "even.json", tmp_path / "out.json"
    file.write_text(json.dumps([1] * 128))
    ran = run("--histogram", str(file), "--policy", "static", "--json", str(out))
    assert ran.exit_code == 0, ran.output
    assert json.loads(out.read_text())["policies"][0]["max_mean"] < 1.03
    assert "even.json" in ran.output


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--layout", "ep=x"], "layout.ep: 'x'"),
        (["--layout", "experts=4"], "layout: 'experts=4'"),
        (["--layout", "ep=7"], "ep: 7 does not divide"),
        (["--layout", "dp=3"], "dp: "),
        (["--layout", "ep=16,ep=8"], "layout.ep: given twice"),
        (["--trace", "/tmp"], "trace: /tmp is a folder"),
        (["--policy", "statc"], "did you mean 'static'"),
        (["--model", "Llama-3.1-8B"], "model: "),
        (["--cluster", "trn9"], "instance: the catalog has no 'trn9'"),
        (["--histogram", "none.json"], "histogram: "),
    ],
)
def test_bad_input_is_one_clear_error(more, complaint):
    ran = run(*more)
    assert ran.exit_code == 2
    assert complaint in ran.output.replace("\n", " ")


def test_it_does_without_torch():
    code = "import sys; import anabranch.cli.simulate; print({'torch', 'transformers'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout == "set()\n", ran.stderr
