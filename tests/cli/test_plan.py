"""`anabranch plan`: the example of the issue, one clear line for every mistake, no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.main import app

SOURCES = Path(__file__).resolve().parents[2] / "src"
EXAMPLE = ("--model", "Qwen/Qwen3-30B-A3B-config.json", "--cluster", "trn2.48xlarge:4", "--tokens", "1e12")


def invoke(*options):
    return CliRunner().invoke(
        app, ["plan", *map(str, options)], catch_exceptions=False, env={"COLUMNS": "220", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def example():
    result = invoke(*EXAMPLE, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_example_is_answered_with_intervals(example):
    assert example["chips"] == 64
    layout = example["layout"]
    assert layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"] == 64
    for name in ("step_s", "training_s", "usd", "kwh"):
        one = example[name]
        assert 0 < one["low90"] < one["low80"] < one["predicted"] < one["high80"] < one["high90"]
    assert example["steps"] == -(-(10**12) // (layout["global_batch"] * 4096))
    productive_s = example["steps"] * example["step_s"]["predicted"]
    assert productive_s < example["training_s"]["predicted"] < 1.01 * productive_s  # four nodes fail rarely
    memory = example["memory_gib"]
    assert memory["predicted"] <= memory["room"] == pytest.approx(0.9 * 96)
    assert memory["low90"] <= memory["low80"] < memory["high80"] <= memory["high90"]
    assert sum(memory["parts"].values()) == pytest.approx(memory["predicted"], rel=1e-3)
    assert sum(example["parts_s"].values()) == pytest.approx(example["step_s"]["predicted"], rel=1e-3)


def test_a_chip_without_runs_is_said_to_be_extrapolated(example):
    told = "no published run of this chip (trainium2): extrapolated"
    assert any(line.startswith(told) for line in example["unmeasured"])
    known = json.loads(invoke("--cluster", "p5.48xlarge:8", "--json", "-").stdout)
    assert not any("no published run of this chip" in line for line in known["unmeasured"])
    width, known_width = (one["step_s"]["high90"] / one["step_s"]["low90"] for one in (example, known))
    assert width > known_width


def test_explain_names_the_source_of_every_figure():
    shown = invoke(*EXAMPLE, "--explain", "--seq-len", "8192").stdout
    for figure in (
        "667 TFLOP/s",
        "96 GiB",
        "2900 GB/s",
        "512 GB/s",
        "35.7608 USD/h",
        "1.15 ratio",
        "450..550 W",
    ):
        assert any(figure in line or figure.replace(" ", "") in line for line in shown.splitlines()), figure
    assert "aws-neuron-sdk docs" in shown
    assert "static placement of natural_tiny.npz" in shown
    (asked,) = [line for line in shown.splitlines() if "seq_len" in line]
    assert "yours" in asked


def test_a_histogram_and_a_policy_make_the_skew(tmp_path):
    hot = tmp_path / "hot.json"
    hot.write_text(json.dumps([1000, *[10] * 127]))
    result = invoke("--cluster", "p5.48xlarge:4", "--histogram", hot, "--policy", "exact", "--json", "-")
    made = json.loads(result.stdout)
    assert made["skew"] == 1.0
    assert any(one["source"].startswith("exact placement of hot.json; guests") for one in made["assumptions"])


def test_two_instances_are_compared_over_the_same_work():
    result = invoke("--compare", "trn2.48xlarge", "p5.48xlarge", "--json", "-")
    made = json.loads(result.stdout)["comparison"]
    assert (made["left"], made["right"]) == ("trn2.48xlarge:4", "p5.48xlarge:4")
    assert made["verdict"].startswith("no saving is claimed, for lack of runs")
    assert not any("prices of two kinds" in line for line in made["caveats"])
    assert len(made["mfu_curve"]) > 2


def test_other_clusters_and_fewer_nodes_stand_on_the_front(tmp_path):
    file = tmp_path / "plan.json"
    page = tmp_path / "plan.html"
    result = invoke(
        "--cluster", "p5.48xlarge:4", "--cluster", "p4d.24xlarge:1", "--json", file, "--html", page
    )
    assert page.read_text().startswith("<!DOCTYPE html>")
    points = {one["cluster"]: one["best"] for one in json.loads(file.read_text())["pareto"]}
    assert points.keys() >= {"p5.48xlarge:4", "p5.48xlarge:2"}
    assert any(points.values())
    assert "p5.48xlarge:2" in result.stdout


def test_a_price_of_your_own_is_taken(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[instances."trn2.48xlarge".prices]\non-demand = { value = 10, unit = "USD/h" }\n')
    mine = json.loads(invoke(*EXAMPLE, "--catalog", file, "--utilisation", 0.5, "--json", "-").stdout)
    assert mine["basis"] == "on-demand"
    assert mine["usd"]["predicted"] == pytest.approx(
        mine["training_s"]["predicted"] / 3600 * 40 / 0.5, rel=1e-3
    )
    assert any(one["confidence"] == "user" for one in mine["assumptions"])


MISTAKES = {
    "a batch beyond any machine": ((*EXAMPLE, "--global-batch", 10**20), "global_batch: "),
    "a length beyond any machine": ((*EXAMPLE, "--seq-len", 10**23), "seq_len: "),
    "a step that is larger than the run": (
        (*EXAMPLE, "--tokens", "1e6"),
        "global_batch: a step of 1,024 sequences has 4,194,304 tokens, more than the run's 1e+06",
    ),
    "more tokens than there are": ((*EXAMPLE, "--tokens", "1e300"), "tokens: 1e+300 must be"),
    "an empty precision": ((*EXAMPLE, "--precision", ""), "precision: "),
    "hardly a use": ((*EXAMPLE, "--utilisation", "1e-300"), "utilisation: 1e-300 must lie in 0.001 to 1"),
    "no cluster": ([], "cluster: name an instance and how many"),
    "instance": (["--cluster", "trn9:4"], "instance: the catalog has no 'trn9'. It has p4d.24xlarge, "),
    "nodes": (["--cluster", "trn2.48xlarge:0"], "nodes: 0 given, must be at least 1"),
    "nodes in words": (["--cluster", "trn2.48xlarge:four"], "cluster: 'trn2.48xlarge:four': write"),
    "model": (["--cluster", "cpu:1", "--model", "Qwen9"], "model: Qwen9 is no config file"),
    "tokens": ([*EXAMPLE, "--tokens", "0"], "tokens: 0 must be above 0"),
    "negative tokens": ([*EXAMPLE, "--tokens=-1e9"], "tokens: -1e+09 must be above 0"),
    "words": ([*EXAMPLE, "--tokens", "many"], "tokens: 'many' is no number"),
    "seq_len": ([*EXAMPLE, "--seq-len", "0"], "seq_len: 0 must be a whole number from 1 to"),
    "global_batch": ([*EXAMPLE, "--global-batch", "-4"], "global_batch: -4 must be a whole number from 1 to"),
    "does not divide": (
        [*EXAMPLE, "--global-batch", "7", "--seq-len", "4095"],
        "cluster: no layout on 64 chips of trn2.48xlarge:4 divides",
    ),
    "does not fit": (
        ["--model", "Kimi-K2", "--cluster", "trn1.32xlarge:1"],
        "cluster: none of 9660 layouts fits trn1.32xlarge:1: the smallest needs 9",
    ),
    "precision": ([*EXAMPLE, "--precision", "fp4"], "precision: the catalog knows no fp4 peak of trainium2"),
    "no precision": ([*EXAMPLE, "--precision", "int8"], "precision: 'int8' is none of bf16, fp8"),
    "basis": ([*EXAMPLE, "--basis", "on-demand"], "basis: no on-demand price of trn2.48xlarge is known; it has"),
    "utilisation": ([*EXAMPLE, "--utilisation", "1.5"], "utilisation: 1.5 must lie in 0.001 to 1"),
    "policy": ([*EXAMPLE, "--policy", "statik"], "planner: 'statik' is unknown; did you mean 'static'?"),
    "no catalog": ([*EXAMPLE, "--catalog", "none.toml"], "none.toml is no readable TOML file"),
    "no calibration": ([*EXAMPLE, "--calibration", "none.json"], "calibration: none.json: "),
    "no histogram": ([*EXAMPLE, "--histogram", "none.json"], "histogram: none.json is neither a trace"),
    "html": ([*EXAMPLE, "--html", "no/such/folder.html"], "html: no/such/folder.html cannot be written"),
    "emit": (
        [*EXAMPLE, "--emit", "plan.json", "--global-batch", "96"],
        "cluster: `anabranch train` takes a step with every micro-batch, which cannot be 96 sequences on 64 chips",
    ),
    "json": ([*EXAMPLE, "--json", "no/such/folder.json"], "json: no/such/folder.json cannot be written"),
    "compare": ([*EXAMPLE, "--compare", "p5.48xlarge", "p9"], "instance: the catalog has no 'p9'"),
    "no price": ([*EXAMPLE, "--compare", "p5.48xlarge", "dgx-h100"], "basis: no on-demand price of dgx-h100"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_field(name):
    options, told = MISTAKES[name]
    result = invoke(*options)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error {told}"), line


FILES = {
    "malformed": ("[chips.mine\n", "{file} is no readable TOML file: "),
    "negative price": (
        '[instances."trn2.48xlarge".prices]\nspot = { value = -3, unit = "USD/h" }\n',
        'instances."trn2.48xlarge".prices.spot.value: -3 must be finite and not negative',
    ),
    "unknown chip": (
        '[instances.mine]\nchip = "trainum2"\nchips = 4\n',
        "instances.mine.chip: no chip 'trainum2'. Did you mean trainium2?",
    ),
    "unknown field": (
        "[chips.trainium2]\nmemroy = 3\n",
        "chips.trainium2.memroy: no such field. Did you mean memory?",
    ),
    "wrong unit": (
        '[chips.trainium2]\nmemory = { value = 96, unit = "W" }\n',
        "chips.trainium2.memory.unit: 'W' is none of",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_names_the_path_of_the_field(tmp_path, name):
    text, told = FILES[name]
    file = tmp_path / "mine.toml"
    file.write_text(text)
    result = invoke(*EXAMPLE, "--catalog", file)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error " + told.replace("{file}", str(file)))


def test_planning_needs_no_torch():
    code = (
        "import sys; from anabranch.cli.main import app; "
        f"app(['plan', *{EXAMPLE!r}, '--json', '-'], standalone_mode=False); print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.splitlines()[-1] == "False", ran.stderr
