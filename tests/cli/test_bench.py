"""`anabranch bench`: refuses what cannot be measured before a process starts, and keeps what was."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import bench
from anabranch.cli.main import app
from anabranch.workload.trace import TraceWriter

ROW = {
    "ranks": 2, "workload": "W0 balanced", "policy": "bounded", "max_mean_before": 1.0, "max_mean_after": 1.0,
    "guests": 0, "step_ms_median": 10.0, "step_ms_spread": 1.0, "speedup_vs_transformers": 1.0,
    "percent_of_ideal": 100.0, "plan_ms": 0.1,
}  # fmt: skip


class AnyColumn(dict):
    """A row that has whatever column the table shows."""

    def __missing__(self, name):
        return 1.0


@pytest.fixture
def launched(monkeypatch):
    started = []

    def launch(job, settings, ranks, **_):
        started.append((job, ranks, settings))
        return {"rows": [AnyColumn(ROW, ranks=ranks)]}

    monkeypatch.setattr(bench, "launch", launch)
    return started


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


def write_trace(path, *, ids, experts=16, top_k=4):
    writer = TraceWriter(path, model_type="toy", experts=experts, top_k=top_k, ranks=2, tokens_per_rank=3)
    ids_SK = np.tile(np.arange(top_k), (3, 1))
    counts_E = np.bincount(ids_SK.ravel(), minlength=experts)
    writer.append(
        layer=0, step=1, micro=0, counts_RE=np.stack([counts_E] * 2), ids_RSK=[ids_SK] * 2 if ids else None
    )
    writer.save()
    return path


def test_figures_of_every_group_size_are_kept_with_the_machine(launched, tmp_path):
    result = invoke("balance", "--json", tmp_path / "new" / "figures.json", "--quick")
    assert result.exit_code == 0, result.stderr
    assert [(job, ranks) for job, ranks, _ in launched] == [("bench_balance", 2), ("bench_balance", 4)]
    assert all(settings["trace"].endswith("natural_tiny.npz") for *_, settings in launched)
    kept = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert [row["ranks"] for row in kept["rows"]] == [2, 4]
    assert {"cpu", "cores", "system", "python", "torch", "transformers", "numpy"} == kept["machine"].keys()
    assert "W0 balanced" in result.stdout


def test_a_trace_of_ones_own_is_measured(launched, tmp_path):
    path = write_trace(tmp_path / "trace.npz", ids=True)
    assert invoke("balance", "--trace", path, "--ranks", 2).exit_code == 0
    assert [settings["trace"] for *_, settings in launched] == [str(path)]


def refusals(tmp_path):
    corrupt = tmp_path / "corrupt.npz"
    corrupt.write_bytes(write_trace(tmp_path / "whole.npz", ids=True).read_bytes()[:-30])
    counts = write_trace(tmp_path / "counts.npz", ids=False)
    other = write_trace(tmp_path / "other.npz", ids=True, experts=8, top_k=2)
    return {
        "missing": (["--trace", tmp_path / "no.npz"], "trace: .*no.npz: no such file; record one with"),
        "corrupt": (["--trace", corrupt], "trace: .*corrupt.npz: not an .npz file, or cut short"),
        "counts": (["--trace", counts], "trace: .*counts.npz has no token ids; record it with --ids"),
        "other": (
            ["--trace", other],
            "trace: .*other.npz is of 8 experts, 2 a token, the measured layer of 16",
        ),
        "dtype": (["--dtype", "fp16"], "dtype: 'fp16' is unknown; use float32 or bfloat16"),
        "transport": (["--transport", "dedupe"], "transport: 'dedupe' is not one of .*Did you mean 'dedup'"),
        "ranks": (["--ranks", "17"], "ranks: 17 would share 16 experts; use at most that"),
        "json": (["--json", tmp_path], "json: .* is a folder; name a file"),
        "below": (["--json", counts / "figures.json"], "json: .*counts.npz is a file; name a folder"),
    }


NAMES = ("missing", "corrupt", "counts", "other", "dtype", "transport", "ranks", "json", "below")


def test_every_refusal_is_tried(tmp_path):
    assert set(refusals(tmp_path)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_before_anything_starts(launched, tmp_path, name):
    options, told = refusals(tmp_path)[name]
    result = invoke("balance", *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.match(f"error {told}", line), line
    assert launched == []


@pytest.mark.parametrize("options", [["--ranks", 1], ["--rounds", 0], ["--max-mean", 0.5]])
def test_numbers_out_of_range_are_usage_errors(launched, options):
    assert invoke("balance", *options).exit_code == 2
    assert launched == []


def test_the_planner_bench_keeps_its_figures_too(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bench_planner", lambda rounds: [AnyColumn(planner="exact", rounds=rounds)])
    assert invoke("planner", "--rounds", 3, "--json", tmp_path / "figures.json").exit_code == 0
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == [{"planner": "exact", "rounds": 3}]
    assert invoke("planner", "--json", tmp_path).exit_code == 2


def test_ranks_of_a_torchrun_do_not_each_start_a_benchmark(launched, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    result = invoke("balance")
    assert (result.exit_code, launched) == (2, [])
    assert result.stderr == "error ranks: the benchmark starts its own ranks; run it without torchrun\n"
