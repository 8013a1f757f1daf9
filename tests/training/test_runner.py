"""A whole run on two ranks: what it writes, that it resumes exactly, and that it refuses what cannot work.

Shape suffixes: B sequences, S tokens, V vocabulary.
"""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.training.starting import start
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.errors import AnabranchError
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.training.config import RunConfig
from anabranch.training.trainer import AdaptiveTrainer
from anabranch.workload.trace import load_trace

IDS_BS = torch.arange(60).reshape(2, 30) % 50 + 1


def train(settings):
    """On a rank: the summary of a run as JSON gives it back."""
    return json.loads(json.dumps(start(RunConfig.from_dict(settings)).to_dict()))


def train_and_look(settings):
    """On a rank: the summary, and the logits of the sharded model just before it is saved for good."""
    seen = []
    save_model = AdaptiveTrainer.save_model

    def look(trainer, output_dir=None, _internal_call=False):
        if not _internal_call:
            trainer.model.eval()
            with torch.no_grad():
                seen.append(trainer.model(IDS_BS).logits)
        save_model(trainer, output_dir, _internal_call)

    AdaptiveTrainer.save_model = look
    try:
        return train(settings), seen[0]
    finally:
        AdaptiveTrainer.save_model = save_model


class Interrupts:
    """A watcher that sends this process a signal once a step is written, while the next one runs."""

    def __init__(self, step, number):
        self.step = step
        self.number = number

    def write(self, record, layers=()):
        if record.step == self.step:
            os.kill(os.getpid(), self.number)


def train_interrupted(settings, step, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    summary = start(RunConfig.from_dict(settings), [Interrupts(step, number)])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    return summary.to_dict()


def refused(settings):
    """On a rank: the error of a run that must not start, as its type's name and its text."""
    try:
        start(RunConfig.from_dict(settings))
    except AnabranchError as error:
        return type(error).__name__, str(error)
    return None


@pytest.fixture(scope="module")
def settings(toy_run):
    """Of a run of 30 steps on two ranks, but for `out`."""
    return RunConfig(**toy_run).to_dict()


@pytest.fixture(scope="module")
def finished(ranks2, settings, tmp_path_factory):
    """A finished run: its folder, its summary on rank 0, and the logits of the sharded model at its end."""
    out = tmp_path_factory.mktemp("finished") / "run"
    (summary, logits_BSV), _ = ranks2.run(train_and_look, settings | {"out": str(out)})
    return out, summary, logits_BSV


@pytest.fixture
def copied(finished, settings, tmp_path):
    """A copy of the finished run without its summary, as if it died at its end; settings to resume it."""
    out = tmp_path / "copied"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    return out, settings | {"out": str(out), "resume": True}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_a_line(finished):
    out, summary, _ = finished
    rows = lines(out)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["loss"] for row in rows] == summary["losses"]
    assert [row["step"] for row in rows if row["eval_loss"] is not None] == [20, 30]
    for row in rows:
        assert row["tokens"] == 2 * 4 * 32
        assert 1 <= row["max_mean_after"] <= 1.06 < 2
        assert row["max_mean_after"] <= row["max_mean_before"]
        assert row["token_bytes"] > 0
        assert row["step_ms"] > 0
        assert row["joules_per_token"] == row["joules"] / row["tokens"] >= 0
        assert [layer["layer"] for layer in row["layers"]] == [0, 1]
        # 256 tokens of 2 experts each, over two ranks.
        assert [layer["rows_mean"] for layer in row["layers"]] == [256, 256]
    assert any(row["guests"] > 0 and row["weight_bytes"] > 0 for row in rows)


def test_the_loss_falls_and_the_summary_says_so(finished):
    out, summary, _ = finished
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["first_loss"] > math.log(320) - 0.1
    assert summary["last_loss"] < summary["first_loss"] - 0.5
    assert summary["eval_loss"] == lines(out)[-1]["eval_loss"] < summary["first_loss"] - 0.5
    assert (summary["steps"], summary["stopped_early"], summary["planner"]) == (30, False, "bounded")


def test_nothing_is_left_but_the_documented_files(finished):
    out, _, _ = finished
    names = {"run.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in out.parent.iterdir()} == {"run"}
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"checkpoint-20", "checkpoint-30"}


def test_tensorboard_reads_the_same_losses(finished):
    out, summary, _ = finished
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 31))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(summary["losses"])
    assert "balance/max_mean_after" in events.Tags()["scalars"]


def test_plain_transformers_loads_the_model_with_equal_logits(finished):
    out, _, logits_BSV = finished
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        alone_BSV = model(IDS_BS).logits
    torch.testing.assert_close(alone_BSV, logits_BSV, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.decode(tokenizer("def push(heap):").input_ids) == "def push(heap):"
    assert len(tokenizer) == 320


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_with_the_same_losses(ranks2, finished, settings, tmp_path, number):
    _, whole, _ = finished
    stopped = settings | {"out": str(tmp_path / "run")}
    summary, _ = ranks2.run(train_interrupted, stopped, 13, number)
    assert (summary["steps"], summary["stopped_early"], summary["eval_loss"]) == (14, True, None)
    assert not (tmp_path / "run" / "model").exists()
    resumed, _ = ranks2.run(train, stopped | {"resume": True})
    assert resumed["losses"] == whole["losses"]
    assert resumed["eval_loss"] == whole["eval_loss"]
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 31))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 31))


def test_a_checkpoint_left_unfinished_is_passed_over(ranks2, finished, copied):
    out, resume = copied
    (out / "checkpoints" / "checkpoint-30" / "complete.json").unlink()
    (out / "checkpoints" / "checkpoint-30" / "scheduler.pt").unlink()
    summary, _ = ranks2.run(train, resume)
    assert summary["losses"] == finished[1]["losses"]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"checkpoint-20", "checkpoint-30"}
    assert (out / "checkpoints" / "checkpoint-30" / "complete.json").exists()


def test_a_run_that_died_at_its_end_is_evaluated_and_saved_again(ranks2, finished, copied):
    out, resume = copied
    shutil.rmtree(out / "model")
    summary, _ = ranks2.run(train, resume)
    assert summary["losses"] == finished[1]["losses"]
    assert summary["eval_loss"] == finished[1]["eval_loss"]
    again, before = (load_file(folder / "model" / "model.safetensors") for folder in (out, finished[0]))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_another_planner_resumes_to_the_same_losses_within_rounding(ranks2, finished, copied):
    out, resume = copied
    shutil.rmtree(out / "checkpoints" / "checkpoint-30")
    summary, _ = ranks2.run(train, resume | {"experts": vars(AdaptiveSettings("exact"))})
    assert summary["losses"][:20] == finished[1]["losses"][:20]
    assert summary["losses"] == pytest.approx(finished[1]["losses"], rel=1e-4)


def test_static_placement_sees_the_same_data_and_learns_the_same(ranks2, finished, settings, tmp_path):
    static = settings | {"out": str(tmp_path / "run"), "experts": vars(AdaptiveSettings("static"))}
    summary, _ = ranks2.run(train, static)
    assert summary["losses"][0] == pytest.approx(finished[1]["losses"][0], rel=1e-6)
    assert summary["losses"] == pytest.approx(finished[1]["losses"], rel=1e-4)
    assert summary["max_mean_after"] == summary["max_mean_before"] > finished[1]["max_mean_after"]


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"seed": 1}, "CheckpointError", "resume: .* is of another run: seed was 0, now 1"),
        ({"model": "tiny", "sequence_length": 32}, "CheckpointError", "resume: .*model was .*, now 'tiny'"),
    ],
)
def test_another_run_is_not_resumed(ranks2, copied, changes, kind, told):
    out, resume = copied
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert_refused(ranks2, resume | changes, kind, told)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_changed_text_is_another_run(ranks2, copied, toy_text, tmp_path):
    out, resume = copied
    other = tmp_path / "text.txt"
    other.write_text(toy_text.read_text() + "more\n")
    for file in [out / "run.json", *out.glob("checkpoints/*/complete.json")]:
        file.write_text(file.read_text().replace(str(toy_text), str(other)))
    told = "resume: .*checkpoint-30 is of another run: data_fingerprint was"
    assert_refused(ranks2, resume | {"data": [str(other)]}, "CheckpointError", told)


def test_a_changed_architecture_is_another_run(ranks2, copied, toy_model, tmp_path):
    out, resume = copied
    values = json.loads((toy_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    for file in [out / "run.json", *out.glob("checkpoints/*/complete.json")]:
        file.write_text(file.read_text().replace(str(toy_model), str(tmp_path)))
    told = "resume: .*checkpoint-30 is of another run: architecture was"
    assert_refused(ranks2, resume | {"model": str(tmp_path)}, "CheckpointError", told)


def test_lost_records_are_told(ranks2, copied):
    out, resume = copied
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:7] + rows[8:]))
    assert_refused(ranks2, resume, "CheckpointError", r"resume: .*metrics.jsonl is damaged")


def assert_refused(pool, settings, kind, told):
    """Every rank raises the same error, and a folder that was not there is not there now."""
    out = Path(settings["out"])
    existed = out.exists()
    before = set(out.parent.iterdir())
    first, second = pool.run(refused, settings)
    assert first is not None, "the run was not refused"
    assert first == second
    assert first[0] == kind
    assert re.match(told, first[1]), first[1]
    assert out.exists() == existed
    assert set(out.parent.iterdir()) == before


TEXTS = {
    "missing": (None, "data: .* no such file or folder"),
    "binary": (b"\x00\x01text", "data: .* it is binary, not text"),
    "latin-1": ("naïve\n".encode("latin-1") * 99, "data: .* is not UTF-8; convert it"),
    "empty": (b"", "data: .* it is empty; remove it"),
    "shorter than a window": (b"to be\n", "data: .*not one window of sequence_length=32: give more text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_unusable_text_is_refused_before_anything_is_written(ranks2, settings, tmp_path, name):
    content, told = TEXTS[name]
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert_refused(ranks2, settings | {"out": str(tmp_path / "run"), "data": [str(file)]}, "DataError", told)


def test_a_step_larger_than_the_text_is_refused(ranks2, settings, tmp_path):
    told = (
        "data: the text makes .* windows of 32 tokens, a step takes 8000; give more text, or lower batch_size"
    )
    assert_refused(ranks2, settings | {"out": str(tmp_path / "run"), "batch_size": 4000}, "DataError", told)


@pytest.fixture
def weights(finished, tmp_path):
    """A copy of the trained model to spoil."""
    shutil.copytree(finished[0] / "model", tmp_path / "model")
    return tmp_path / "model"


def spoil_bytes(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" * 40)


def drop_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def widen_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"moe_intermediate_size": 48}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_bytes, r"model: the weights in .* cannot be read"),
        (drop_weight, r"model: .* has 1 weights missing or of another shape, such as model.norm.weight"),
        (widen_config, r"model: .* has 4 weights missing or of another shape, such as model.layers.0.mlp"),
    ],
)
def test_unusable_weights_are_refused_before_anything_is_written(
    ranks2, settings, weights, tmp_path, spoil, told
):
    spoil(weights)
    bad = settings | {"out": str(tmp_path / "run"), "model": str(weights)}
    assert_refused(ranks2, bad, "CheckpointError", told)


def test_other_settings_on_one_rank_end_all_ranks(ranks2, settings, tmp_path):
    out = str(tmp_path / "run")
    told = ranks2.run(refused_with_own_seed, settings | {"out": out})
    assert (
        told
        == [("RankError", "seed: seed is 0 on rank 0, 1 on rank 1; start every rank with the same settings")]
        * 2
    )
    assert not (tmp_path / "run").exists()


def refused_with_own_seed(settings):
    return refused(settings | {"seed": int(os.environ["RANK"])})


def test_a_world_of_another_size_is_refused(ranks2, settings, tmp_path):
    told = "ranks: 4 wanted, 2 started; make them equal"
    assert_refused(ranks2, settings | {"out": str(tmp_path / "run"), "ranks": 4}, "ConfigError", told)


def test_a_trained_model_is_gone_on_from_with_its_tokenizer(ranks2, finished, settings, tmp_path):
    out, before, _ = finished
    (tmp_path / "cache").mkdir()
    again = settings | {
        "out": str(tmp_path / "run"),
        "model": str(out / "model"),
        "steps": 2,
        "save_every": 0,
    }
    summary, _ = ranks2.run(train, again | {"cache": str(tmp_path / "cache")})
    assert summary["first_loss"] < before["first_loss"] - 0.5
    assert not list((tmp_path / "cache").glob("tokenizer-*"))  # none was trained
    tokenizers = [(folder / "model" / "tokenizer.json").read_text() for folder in (out, tmp_path / "run")]
    assert tokenizers[0] == tokenizers[1]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_bfloat16_learns_like_float32(ranks2, finished, settings, tmp_path):
    summary, _ = ranks2.run(train, settings | {"out": str(tmp_path / "run"), "dtype": "bfloat16"})
    assert summary["losses"] != finished[1]["losses"]
    assert summary["losses"] == pytest.approx(finished[1]["losses"], rel=0.02)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank_trains_a_plain_model(finished, settings, tmp_path, dtype):
    """The same global batch, so the same losses: half of it in rank 0's first four sequences."""
    one = {"out": str(tmp_path / "run"), "ranks": 1, "batch_size": 8, "dtype": dtype, "save_every": 0}
    summary = train(settings | one)
    rel = 1e-4 if dtype == "float32" else 0.02
    assert summary["losses"] == pytest.approx(finished[1]["losses"], rel=rel)
    if dtype == "bfloat16":
        assert summary["losses"] != pytest.approx(finished[1]["losses"], rel=1e-6)
    assert (summary["max_mean_before"], summary["max_mean_after"]) == (1, 1)
    assert (summary["guests_per_step"], summary["token_mb_per_step"]) == (0, 0)


def test_two_ranks_without_expert_parallelism_train_the_same(ranks2, finished, settings, tmp_path):
    summary, _ = ranks2.run(train, settings | {"out": str(tmp_path / "run"), "ep_size": 1, "save_every": 0})
    assert summary["losses"] == pytest.approx(finished[1]["losses"], rel=1e-4)
    assert summary["max_mean_after"] == 1
    assert summary["token_mb_per_step"] == 0


@pytest.mark.full
def test_two_groups_of_two_ranks_train_the_same_and_are_traced(ranks4, finished, settings, tmp_path):
    four = {"ranks": 4, "ep_size": 2, "batch_size": 2, "trace_every": 2, "trace_ids": True, "steps": 30}
    summary, *_ = ranks4.run(train, settings | {"out": str(tmp_path / "run")} | four)
    assert summary["losses"] == pytest.approx(finished[1]["losses"], rel=1e-4)
    row = lines(tmp_path / "run")[0]
    # 256 tokens of 2 experts each, over four ranks; a group of two ranks balances among itself.
    assert row["layers"][0]["rows_mean"] == 128
    assert row["layers"][0]["rows_after_max"] >= row["layers"][0]["rows_mean"]
    trace = load_trace(tmp_path / "run" / "routing.npz")
    assert trace.counts_NRE.shape == (30, 2, 4)  # 15 steps of 2 layers, in rank 0's group
    assert (trace.counts_NRE.sum(axis=(1, 2)) == 2 * 2 * 32 * 2).all()
    assert np.array_equal(trace.step_N, np.repeat(np.arange(2, 31, 2), 2))
    assert np.array_equal(trace.layer_N, np.tile([0, 1], 15))
    assert trace.ids is not None
    assert trace.metadata["tokens_per_rank"] == 64


def test_a_run_by_itself_needs_no_group(settings, tmp_path):
    """Called from Python in one process: two ranks are wanted, nobody started them."""
    assert refused(settings | {"out": str(tmp_path / "run")}) == (
        "ConfigError",
        "ranks: 2 wanted, 1 started; make them equal",
    )
