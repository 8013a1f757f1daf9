"""`anabranch train` and `trace`: one clear line for every mistake, and what is run for which options."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli import train as commands
from anabranch.cli.main import app
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.training.config import RunConfig
from anabranch.training.folder import write_json
from anabranch.workload.trace import load_trace

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = {
    "planner": "bounded", "steps": 30, "stopped_early": False, "first_loss": 5.7, "last_loss": 4.0,
    "eval_loss": 4.1, "step_ms_median": 50.0, "tokens_per_s": 5120.0, "max_mean_before": 1.5,
    "max_mean_after": 1.05, "guests_per_step": 2.0, "token_mb_per_step": 1.0, "weight_mb_per_step": 0.5,
    "joules_per_step": 0.4, "joules_per_token": 1e-3, "energy_source": "estimate", "losses": [5.7, 4.0],
}  # fmt: skip


@pytest.fixture
def invoke(tmp_path):
    """Run the command line in this process, in a folder of its own cache."""

    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture
def launched(monkeypatch):
    """Runs that would have been started; each comes to SUMMARY, and leaves a run's folder."""
    runs = []

    def launch(job, settings, ranks, *, timeout_s):
        config = RunConfig.from_dict(settings)
        runs.append(config)
        assert (job, ranks, timeout_s) == ("train", config.ranks, config.timeout_s)
        config.folder.claim(settings)
        summary = SUMMARY | {"planner": config.experts.planner}
        write_json(config.folder.summary, summary)
        return summary

    monkeypatch.setattr(commands, "launch", launch)
    return runs


def refusals(toy_model, tmp_path):
    """Options that cannot work, and what the user is told."""
    file = tmp_path / "file.json"
    file.write_text("{")
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "llama"}')
    wide = tmp_path / "wide"
    wide.mkdir()
    shape = json.loads((toy_model / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(shape | {"num_experts": 16}))
    full = tmp_path / "full"
    full.mkdir()
    (full / "config.json").write_text("{}")
    return {
        "planner": (["--planner", "bouned"], "planner: 'bouned' is unknown; did you mean 'bounded'? choose one of"),
        "transport": (["--transport", "all_too_all"], "transport: 'all_too_all' is not one of auto"),
        "epsilon": (["--epsilon", "-0.1"], "epsilon: "),
        "slots": (
            ["--slots", "1", "--planner", "exact", "--model", wide],
            "slots: 1 guest slots a rank are too few to level 8 experts a rank; use slots=8, or planner=bounded",
        ),
        "no slots": (["--slots", "0"], "slots: "),
        "ep_size": (["--ep-size", "3"], "ep_size: 3 does not divide ranks=2; use one of 1, 2"),
        "ranks": (["--ranks", "5"], "ep_size: 5 ranks would share 4 experts; use at most 4"),
        "no ranks": (["--ranks", "0"], "ranks: 0 is too small; use at least 1"),
        "model": (["--model", "tinny"], "model: 'tinny' is neither a preset (tiny, tiny8, small) nor a folder"),
        "dense": (["--model", dense], "model: llama has no expert-parallel plan in transformers; use a MoE"),
        "config": (["--model", file], f"model: {file} is not a model configuration: It looks like the config"),
        "dtype": (["--dtype", "float16"], "dtype: 'float16' is unknown; use float32 or bfloat16"),
        "sequence": (["--sequence-length", "65"], "sequence_length: 65 is more than the model's max_position"),
        "rate": (["--learning-rate", "nan"], "learning_rate: nan is not a learning rate; use one between"),
        "out": (["--out", file], f"out: {file} is a file; name a folder"),
        "foreign": (["--out", full], f"out: {full} holds files that are not of a run; name a new or empty"),
        "below": (["--out", file / "run"], f"out: {file} is a file; name a folder"),
        "resume": (["--resume"], "holds no run; start one without --resume"),
        "both": (["--resume", "--overwrite"], "resume: resume and overwrite contradict each other; give one"),
        "compare": (["--compare", "statik"], "compare: 'statik' is unknown; did you mean 'static'?"),
        "same": (["--compare", "bounded"], "compare: bounded is the run's own planner; name another one"),
        "cache": (["--cache", file], f"cache: {file} is a file; name a folder"),
    }  # fmt: skip


NAMES = (
    "planner", "transport", "epsilon", "slots", "no slots", "ep_size", "ranks", "no ranks", "model", "dense",
    "config", "dtype", "sequence", "rate", "out", "foreign", "below", "resume", "both", "compare", "same", "cache",
)  # fmt: skip


def test_every_refusal_is_tried(toy_model, tmp_path):
    assert set(refusals(toy_model, tmp_path)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_before_anything_starts(
    invoke, launched, toy_options, toy_model, tmp_path, name
):
    options, told = refusals(toy_model, tmp_path)[name]
    out = tmp_path / "new" / "run"
    before = sorted(tmp_path.rglob("*"))
    result = invoke("train", *toy_options, "--out", out, *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error ")
    assert told in line
    assert result.stdout == ""
    assert launched == []
    assert sorted(tmp_path.rglob("*")) == before


def test_markup_in_a_message_is_not_interpreted(invoke, toy_options, tmp_path):
    result = invoke("train", *toy_options, "--out", tmp_path / "run", "--planner", "[red]x[/red]")
    assert "'[red]x[/red]' is unknown" in result.stderr


def test_usage_is_told_by_the_command_line_itself(invoke, tmp_path):
    for arguments in (["train", "--stepz", "3"], ["train", "--steps", "many"], ["nothing"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr


def test_every_option_reaches_the_run(invoke, launched, toy_model, toy_text, tmp_path):
    result = invoke(
        *("train", "--model", toy_model, "--data", toy_text, "--data", "stdlib", "--out", tmp_path / "run"),
        *("--ranks", 4, "--ep-size", 2, "--planner", "exact", "--epsilon", 0.2, "--slots", 3),
        *("--transport", "dedup", "--dtype", "bfloat16", "--steps", 7, "--batch-size", 3),
        *("--sequence-length", 16, "--learning-rate", 0.5, "--seed", 11, "--save-every", 5),
        *("--eval-every", 6, "--max-bytes", 999, "--cache", tmp_path / "cache", "--timeout-s", 77),
    )
    assert result.exit_code == 0, result.stderr
    assert launched == [
        RunConfig(
            model=str(toy_model), data=(str(toy_text), "stdlib"), out=str(tmp_path / "run"), ranks=4, ep_size=2,
            experts=AdaptiveSettings("exact", 0.2, 3, "dedup"), dtype="bfloat16", steps=7, batch_size=3,
            sequence_length=16, learning_rate=0.5, seed=11, save_every=5, eval_every=6, max_bytes=999,
            cache=str(tmp_path / "cache"), timeout_s=77,
        )
    ]  # fmt: skip


def test_a_plan_sets_what_the_command_line_does_not(invoke, launched, toy_model, tmp_path):
    plan = tmp_path / "plan.json"
    settings = {
        "model": str(toy_model),
        "ranks": 2,
        "ep_size": 1,
        "batch_size": 3,
        "planner": "exact",
        "steps": 9,
    }
    plan.write_text(json.dumps({"anabranch_plan": 1, "train": settings}))
    assert invoke("train", "--out", tmp_path / "run", "--plan", plan, "--steps", 4).exit_code == 0
    assert launched == [
        RunConfig(
            model=str(toy_model), out=str(tmp_path / "run"), ranks=2, ep_size=1, batch_size=3, steps=4,
            experts=AdaptiveSettings("exact"),
        )
    ]  # fmt: skip


def test_a_plan_that_is_none_is_one_line(invoke, launched, tmp_path):
    result = invoke("train", "--out", tmp_path / "run", "--plan", tmp_path / "none.json")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error plan: ")
    assert launched == []


def test_a_plan_for_this_machine_starts_a_run(toy_model, toy_text, tmp_path):
    plan = tmp_path / "plan.json"
    planned = command(
        *("plan", "--model", toy_model, "--cluster", "cpu:1", "--tokens", 4096, "--seq-len", 32),
        *("--global-batch", 4, "--policy", "bounded", "--emit", plan),
    )
    assert planned.returncode == 0, planned.stderr
    # The plan is of one chip, this machine; two processes share it.
    ran = command(
        *("train", "--plan", plan, "--ranks", 2, "--ep-size", 2, "--steps", 3, "--data", toy_text),
        *("--out", tmp_path / "run", "--cache", tmp_path / "cache", "--save-every", 0, "--json"),
    )
    assert ran.returncode == 0, ran.stderr
    (summary,) = json.loads(ran.stdout)
    assert (summary["planner"], summary["steps"]) == ("bounded", 3)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (kept["sequence_length"], kept["batch_size"], kept["dtype"]) == (32, 4, "float32")


def test_the_defaults_are_those_of_a_run(invoke, launched, tmp_path):
    invoke("train", "--out", tmp_path / "run")
    assert launched == [RunConfig(out=str(tmp_path / "run"))]


def test_slots_may_be_few_where_not_every_load_is_to_be_levelled(invoke, launched, toy_options, tmp_path):
    few = ("--slots", 1, "--planner")
    for planner, epsilon, code in (
        ("bounded", 0.05, 0),
        ("bounded", 0, 2),
        ("static", 0, 0),
        ("exact", 0.05, 2),
    ):
        out = tmp_path / f"{planner}-{epsilon}"
        assert (
            invoke("train", *toy_options, "--out", out, *few, planner, "--epsilon", epsilon).exit_code == code
        )
    # Not asked for: `exact` takes what it needs.
    assert invoke("train", *toy_options, "--out", tmp_path / "run", "--planner", "exact").exit_code == 0
    assert len(launched) == 3


@pytest.fixture
def options(toy_options, tmp_path):
    return ["train", *toy_options, "--out", tmp_path / "run"]


def test_a_comparison_runs_both_and_keeps_them_side_by_side(invoke, launched, options, tmp_path):
    result = invoke(*options, "--compare", "static", "--json")
    assert result.exit_code == 0
    first, second = launched
    assert second == replace(
        first, out=f"{first.out}/static", experts=replace(first.experts, planner="static")
    )
    kept = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [summary["planner"] for summary in kept] == ["bounded", "static"]
    assert json.loads(result.stdout) == kept


def test_a_finished_run_is_reported_not_run_again(invoke, launched, options):
    first = invoke(*options)
    assert len(launched) == 1
    again = invoke(*options, "--resume")
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert len(launched) == 1
    refused = invoke(*options)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert invoke(*options, "--overwrite").exit_code == 0
    assert len(launched) == 2


def test_an_interrupted_comparison_goes_on_where_it_was(invoke, launched, options, tmp_path):
    invoke(*options)
    compared = (*options, "--compare", "static", "--resume")
    second = tmp_path / "run" / "static"
    # Stopped before the second run began.
    assert invoke(*compared).exit_code == 0
    assert [(c.experts.planner, c.resume, c.overwrite) for c in launched[1:]] == [("static", False, True)]
    # Killed in the second run before its first checkpoint.
    (second / "summary.json").unlink()
    assert invoke(*compared).exit_code == 0
    assert (launched[2].out, launched[2].resume, launched[2].overwrite) == (str(second), False, True)
    # Stopped in the second run with a checkpoint.
    (second / "summary.json").unlink()
    (second / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (second / "checkpoints" / "checkpoint-5" / "complete.json").write_text("{}")
    assert invoke(*compared).exit_code == 0
    assert (launched[3].out, launched[3].resume, launched[3].overwrite) == (str(second), True, False)
    # Both are through.
    assert invoke(*compared).exit_code == 0
    assert len(launched) == 4


def test_a_stopped_run_says_how_to_go_on(invoke, options, tmp_path, monkeypatch):
    stopped = SUMMARY | {"stopped_early": True, "steps": 12}
    monkeypatch.setattr(commands, "launch", lambda *args, **kwargs: stopped)
    result = invoke(*options, "--compare", "static")
    assert result.exit_code == 130
    assert result.stderr == f"stopped after step 12 of 30, saved in {tmp_path / 'run'}; go on with --resume\n"
    assert result.stdout == ""


def test_an_interruption_is_said(invoke, options, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "launch", interrupted)
    result = invoke(*options)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_trace_is_a_static_run_that_records(invoke, launched, toy_model, toy_text, tmp_path):
    result = invoke(
        *("trace", "--model", toy_model, "--data", toy_text, "--out", tmp_path / "run", "--steps", 6),
        *("--every", 2, "--ids", "--seed", 3, "--sequence-length", 16, "--cache", tmp_path / "cache"),
        *("--timeout-s", 9, "--max-bytes", 999, "--batch-size", 2),
    )
    assert result.exit_code == 0, result.stderr
    assert launched == [
        RunConfig(
            model=str(toy_model), data=(str(toy_text),), out=str(tmp_path / "run"), steps=6, trace_every=2,
            trace_ids=True, seed=3, sequence_length=16, cache=str(tmp_path / "cache"), timeout_s=9,
            max_bytes=999, batch_size=2, save_every=0, eval_every=0, experts=AdaptiveSettings("static"),
        )
    ]  # fmt: skip


def test_a_trace_of_one_rank_is_refused(invoke, launched, tmp_path):
    result = invoke("trace", "--out", tmp_path / "run", "--ranks", 1)
    assert result.exit_code == 2
    assert "ranks: routing is recorded between ranks that share experts; use at least 2" in result.stderr
    assert invoke("trace", "--out", tmp_path / "run", "--every", 0).exit_code == 2
    assert launched == []


def command(*arguments, launcher=("-m", "anabranch")):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(ran, env=environment, capture_output=True, text=True, timeout=250)


def test_unusable_text_from_the_shell_is_one_line(options, tmp_path):
    """Found by the ranks: each of them meets it, the launcher alone tells."""
    binary = tmp_path / "text.txt"
    binary.write_bytes(b"\x00\x01")
    ran = command(*options, "--data", binary)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert (
        ran.stderr == f"error data: {binary}: it is binary, not text; remove it, or give its text as UTF-8\n"
    )
    assert not (tmp_path / "run").exists()
    assert sorted(tmp_path.iterdir()) == [binary]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.mark.full
def test_a_trace_is_recorded_under_an_outer_torchrun(options, tmp_path):
    """`trace` takes fewer options than `train`."""
    taken = [str(option) for option in options[1:]]
    for name in ("--learning-rate", "--save-every", "--eval-every"):
        at = taken.index(name)
        del taken[at : at + 2]
    launcher = (*TORCHRUN, "-m", "anabranch.cli.main")
    ran = command("trace", *taken, "--steps", 3, "--json", launcher=launcher)
    assert ran.returncode == 0, ran.stderr
    (summary,) = json.loads(ran.stdout)  # printed once
    assert summary["planner"] == "static"
    trace = load_trace(tmp_path / "run" / "routing.npz")
    assert trace.layer_N.tolist() == [0, 1] * 3
    assert trace.ids is None


def test_ranks_of_an_outer_torchrun_that_disagree_end_with_the_reason(options, tmp_path):
    """Each starts with its own rank as the seed; both are valid by themselves."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom anabranch.cli.main import app\n"
        "sys.argv += ['--seed', os.environ['RANK']]\napp()\n"
    )
    ran = command(*options, launcher=(*TORCHRUN, script))
    assert ran.returncode != 0
    told = "error seed: seed is 0 on rank 0, 1 on rank 1; start every rank with the same settings"
    assert [line for line in ran.stderr.splitlines() if line.startswith("error ")] == [told]
    assert "exitcode  : 2" in ran.stderr  # torchrun's own report, of rank 0
    assert not (tmp_path / "run").exists()


@pytest.mark.full  # the same on a pool of ranks: tests/training/test_runner.py
def test_an_outer_torchrun_of_another_size_is_refused(options, tmp_path):
    launcher = (*TORCHRUN, "-m", "anabranch")
    ran = command(*options, "--ranks", 4, launcher=launcher)
    told = "error ranks: 4 wanted, 2 started; make them equal"
    assert [line for line in ran.stderr.splitlines() if line.startswith("error ")] == [told]
    assert not (tmp_path / "run").exists()
