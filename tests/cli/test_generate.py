"""`anabranch generate` on a toy model with a tokenizer, end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from anabranch.cli.main import app
from anabranch.scheduling.speculation import StepTimes
from anabranch.serving.batch.prompts import read_prompts
from anabranch.telemetry.record import ENERGY_TOLD
from anabranch.training.tokens import load_or_train_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 4096, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy_text: Path) -> Path:
    """A model of random weights with a tokenizer of the text, and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_or_train_tokenizer([toy_text.read_text()], 400, folder / "cache")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def with_words_of(folder: Path, other: Path) -> Path:
    """`other`, which then has the tokenizer of `folder`."""
    for file in folder.glob("tok*"):
        (other / file.name).write_bytes(file.read_bytes())
    return other


@pytest.fixture(scope="module")
def large(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same words for a model of 3.4 MiB, 3 of them experts."""
    large = with_words_of(folder, tmp_path_factory.mktemp("large"))
    sizes = SIZES | {"num_experts": 32, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=400, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(large)
    return large


@pytest.fixture(scope="module")
def echo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same words for a model that says its last token again and again, on any processor."""
    echo = with_words_of(folder, tmp_path_factory.mktemp("echo"))
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=400, tie_word_embeddings=True, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                weight.zero_()  # layers add nothing to the embedding, which is nearest to itself
    model.save_pretrained(echo)
    return echo


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("def heappush(heap, item):\n\nclass Fraction(numbers.Rational):\nimport re\n")
    return path


def run(folder: Path, prompts: Path, *options: str) -> tuple[Result, list[dict[str, Any]]]:
    """The result, and the lines of the output file."""
    out = prompts.parent / "out.jsonl"
    arguments = [str(folder), "--prompts", str(prompts), "--out", str(out), "--threads", "1", *options]
    result = CliRunner().invoke(app, ["generate", *arguments])
    lines = out.read_text().splitlines() if out.exists() else []
    return result, [json.loads(line) for line in lines]


def test_a_line_for_every_sample(folder: Path, prompts: Path) -> None:
    options = ["--samples", "3", "--temperature", "1", "--max-new-tokens", "12", "--logprobs", "--json"]
    result, lines = run(folder, prompts, *options)
    assert result.exit_code == 0, result.output
    assert {(line["prompt"], line["sample"]) for line in lines} == {
        (p, s) for p in range(3) for s in range(3)
    }
    assert all(
        len(line["tokens"]) == len(line["logprobs"]) == 12 and line["end"] == "length" for line in lines
    )
    assert all(line["text"] for line in lines) and len({line["text"] for line in lines}) == 9
    report = json.loads(result.stdout)
    assert (report["samples"], report["new_tokens"], report["failed_prompts"]) == (9, 108, 0)
    assert report["tokens_per_s"] > 0 and report["cpu_s_per_token"] > 0 and report["step"] == "native"
    if report["energy_source"] is None:  # no counter on this machine
        assert report["joules_per_token"] is None
    else:
        assert report["joules_per_token"] > 0 and report["energy_source"] in ENERGY_TOLD


def test_both_steps_and_any_number_of_slots_give_the_same(folder: Path, prompts: Path) -> None:
    options = ["--samples", "2", "--temperature", "1", "--max-new-tokens", "10", "--overwrite"]
    first, *others = (
        sorted(run(folder, prompts, *options, *more)[1], key=lambda line: (line["prompt"], line["sample"]))
        for more in (["--step", "native"], ["--step", "torch"], ["--slots", "1"], ["--speculate", "4"])
    )
    assert others == [first] * 3


def test_guesses_are_told_and_change_nothing(
    echo: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every step takes as long, so that guesses pay: on a busy machine one slow step can forbid them.
    tell = StepTimes.tell
    monkeypatch.setattr(StepTimes, "tell", lambda times, rows, _: tell(times, rows, 1.0))
    plain = run(echo, prompts, "--max-new-tokens", "60")[1]
    assert all(len(set(line["tokens"])) == 1 for line in plain)
    options = ["--max-new-tokens", "60", "--speculate", "6", "--overwrite", "--json"]
    result, guessed = run(echo, prompts, *options)
    assert sorted(g["tokens"] for g in guessed) == sorted(p["tokens"] for p in plain)
    report = json.loads(result.stdout)
    assert 0 < report["right_guesses"] <= report["guessed_tokens"]


def test_a_model_three_times_its_memory_gives_the_same(large: Path, prompts: Path) -> None:
    options = ["--max-new-tokens", "16", "--json"]
    whole, lines = run(large, prompts, *options)
    assert whole.exit_code == 0 and json.loads(whole.stdout)["expert_store"] is None
    store = ["--memory-limit-mib", "1", "--store-folder", str(prompts.parent / "store")]
    limited, same = run(large, prompts, *options, *store, "--overwrite")
    assert limited.exit_code == 0, limited.output
    figures = json.loads(limited.stdout)["expert_store"]
    assert 0 < figures["slots"] < figures["experts"] / 3 and 0 < figures["hit_rate"] < 1
    assert sorted(same, key=lambda line: line["prompt"]) == sorted(lines, key=lambda line: line["prompt"])
    refused, _ = run(large, prompts, *store, "--step", "torch", "--overwrite")
    assert refused.exit_code == 2 and "memory_limit_mib" in refused.stderr


def votes(lines: list[dict[str, Any]]) -> dict[int, str]:
    """The answers that prompts' samples voted for."""
    return {line["prompt"]: line["vote"] for line in lines if "vote" in line}


def test_experts_over_several_ranks_give_the_same(folder: Path, prompts: Path) -> None:
    """Votes included; what a run over ranks leaves undone, one process finishes."""
    asked = ["--samples", "3", "--temperature", "1", "--max-new-tokens", "10", "--vote", "(e)", "--json"]
    alone, lines = run(folder, prompts, *asked, "--step", "torch")
    assert alone.exit_code == 0, alone.output
    spread, same = run(folder, prompts, *asked, "--ranks", "2", "--planner", "exact", "--overwrite")
    assert spread.exit_code == 0, spread.output

    def samples(of: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [line for line in of if line.get("end") != "cancelled" and "sample" in line]
        return sorted(kept, key=lambda line: (line["prompt"], line["sample"]))

    assert samples(same) == samples(lines) and len(samples(same)) >= 6
    report = json.loads(spread.stdout)
    assert (report["ranks"], report["step"], report["votes"]) == (2, "torch", 3)
    assert report["samples"] == json.loads(alone.stdout)["samples"]
    out = prompts.parent / "out.jsonl"
    half = out.read_text().splitlines(keepends=True)[:4]
    out.write_text("".join(half) + '{"prompt": 2, "sam')
    resumed, whole = run(folder, prompts, *asked, "--ranks", "2", "--resume")
    assert resumed.exit_code == 0, resumed.output
    # A sample that had ended may decide a vote before others end.
    assert len(samples(whole)) >= 6 and all(sample in samples(lines) for sample in samples(whole))
    assert votes(whole) == votes(lines)
    again, _ = run(folder, prompts, *asked, "--step", "torch", "--resume")
    assert json.loads(again.stdout)["samples"] == 0


def test_what_several_ranks_cannot_do_is_said(folder: Path, prompts: Path) -> None:
    for options, said in (
        (["--step", "native"], "step"),
        (["--memory-limit-mib", "1"], "memory_limit_mib"),
        (["--dtype", "int8"], "dtype"),
        (["--wire", "int3"], "dispatch_wire"),
    ):
        result, lines = run(folder, prompts, "--ranks", "2", *options)
        assert result.exit_code == 2 and said in result.stderr and lines == [], result.output


def test_why_the_native_step_was_not_taken(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": None, "hidden_act": "gelu"}
    other = prompts.parent / "gelu"
    other.mkdir()
    for file in folder.glob("*.*"):
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config))
    result, lines = run(other, prompts, "--max-new-tokens", "2")
    assert result.exit_code == 0 and len(lines) == 3
    assert "activation 'gelu' is not silu" in result.stderr
    result, _ = run(other, prompts, "--max-new-tokens", "2", "--step", "native", "--overwrite")
    assert result.exit_code == 2 and "step='torch'" in result.stderr


def test_a_stop_string_ends_the_text_before_it(folder: Path, prompts: Path) -> None:
    _, whole = run(folder, prompts, "--max-new-tokens", "30")
    stop = whole[0]["text"][5:8]
    _, lines = run(folder, prompts, "--max-new-tokens", "30", "--stop", stop, "--overwrite")
    before = {line["prompt"]: line["text"] for line in whole}
    for line in lines:
        assert line["text"] == before[line["prompt"]].split(stop)[0]
        assert (line["end"] == "stop") == (stop in before[line["prompt"]])
    assert any(line["end"] == "stop" and len(line["tokens"]) < 30 for line in lines)


def test_a_thinking_budget_forces_the_end(folder: Path, prompts: Path) -> None:
    thinking = ["--thinking-budget", "5", "--end-of-thought", "</think>", "--closing-words", "\nWait."]
    _, lines = run(folder, prompts, "--max-new-tokens", "40", "--logprobs", *thinking)
    for line in lines:
        forced = [i for i, logprob in enumerate(line["logprobs"]) if logprob is None]
        assert forced and forced == list(range(5, 5 + len(forced)))
        assert "\nWait.</think>" in line["text"] and len(line["tokens"]) == 40


def test_a_vote_ends_early_and_says_what_it_saved(folder: Path, prompts: Path) -> None:
    options = ["--samples", "9", "--temperature", "0.9", "--max-new-tokens", "20", "--slots", "2", "--json"]
    result, lines = run(folder, prompts, *options, "--vote", "(.|\n)$")
    votes = {line["prompt"]: line for line in lines if "vote" in line}
    assert set(votes) == {0, 1, 2}
    for number, vote in votes.items():
        ends = [line["end"] for line in lines if line["prompt"] == number and "sample" in line]
        assert len(ends) == 9 and ends.count("cancelled") == vote["cancelled"] == 9 - vote["finished"]
    result, lines = run(folder, prompts, *options, "--vote", "()", "--overwrite")
    report = json.loads(result.stdout)
    assert report["cancelled_samples"] == 3 * 4, "all agree on nothing, so five of nine decide"
    assert 0 < report["saved_tokens"] <= 12 * 20


def test_chat_goes_through_the_template(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path.write_text(json.dumps({"messages": said}) + '\n{"prompt": "Hello"}\n')
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        json.dumps({"prompt": "system: Be brief.\nuser: Hello\nassistant:"}) + "\n"
        + json.dumps({"prompt": "user: Hello\nassistant:"}) + "\n"
    )  # fmt: skip
    _, chatted = run(folder, path, "--chat", "--max-new-tokens", "8")
    _, typed = run(folder, plain, "--max-new-tokens", "8", "--overwrite")
    assert chatted == typed
    result, _ = run(folder, path, "--max-new-tokens", "8", "--overwrite")
    assert result.exit_code == 2 and "line 1 holds messages" in result.stderr


def test_a_prompt_too_long_fails_alone(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "word " * 5000}) + '\n{"prompt": "b"}\n')
    result, lines = run(folder, path, "--max-new-tokens", "4")
    assert result.exit_code == 0 and "1 prompts failed" in result.stderr
    assert {line["prompt"] for line in lines if "text" in line} == {0, 2}
    (failure,) = [line for line in lines if "error" in line]
    assert failure["prompt"] == 1 and "more than the 4096 a chain may have" in failure["error"]


def test_what_failed_is_tried_again(folder: Path, tmp_path: Path) -> None:
    """It may have failed for memory, which a run that goes on may have more of."""
    path = tmp_path / "prompts.txt"
    path.write_text("def wrap")
    options = ["--max-new-tokens", "2100"]
    _, before = run(folder, path, *options, "--kv-memory-mib", "1")
    assert [sorted(line) for line in before] == [["error", "prompt"]]
    result, lines = run(folder, path, *options, "--kv-memory-mib", "2", "--resume", "--json")
    assert lines[0] == before[0] and lines[1]["end"] == "length"
    assert json.loads(result.stdout)["failed_prompts"] == 0


def test_lines_end_where_an_editor_ends_them(tmp_path: Path) -> None:
    """Not at other characters that Python's `splitlines` takes for an end."""
    texts = ["a\u2028b", "c\x0cd\x85e"]
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes("\r\n".join(texts).encode() + b"\n")
    lines.write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\n" for t in texts))
    for path in (plain, lines):
        assert [(p.line, p.text) for p in read_prompts(path)] == [(1, texts[0]), (2, texts[1])]


def test_resume_does_what_is_missing(folder: Path, prompts: Path) -> None:
    options = ["--samples", "4", "--temperature", "1", "--max-new-tokens", "10", "--vote", "(.|\n)$"]
    _, whole = run(folder, prompts, *options)
    out = prompts.parent / "out.jsonl"
    kept = [line for line in whole if line["prompt"] == 0 or ("sample" in line and line["sample"] == 0)]
    out.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"prompt": 2, "sam')
    result, lines = run(folder, prompts, *options, "--resume", "--json")
    assert lines[: len(kept)] == kept

    def finished(lines: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
        return sorted((s["prompt"], s["sample"], s["text"]) for s in lines if s.get("end") == "length")

    assert votes(lines) == votes(whole) and finished(lines) == finished(whole)
    assert 0 < json.loads(result.stdout)["samples"] < 12
    again, after = run(folder, prompts, *options, "--resume", "--json")
    assert after == lines and json.loads(again.stdout)["samples"] == 0


def test_resume_refuses_other_settings(folder: Path, prompts: Path) -> None:
    run(folder, prompts, "--max-new-tokens", "4")
    result, _ = run(folder, prompts, "--max-new-tokens", "5", "--resume")
    assert result.exit_code == 2 and "max_new_tokens was 4, now 5" in result.stderr
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + bytes(4))
    result, _ = run(folder, prompts, "--max-new-tokens", "4", "--resume")
    weights.write_bytes(before)
    assert result.exit_code == 2 and "weights was" in result.stderr
    result, _ = run(folder, prompts, "--max-new-tokens", "4")
    assert result.exit_code == 2 and "--resume" in result.stderr and "--overwrite" in result.stderr


def test_an_interrupt_keeps_what_is_finished(folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("def f():\n" * 400)
    command = [
        sys.executable, "-m", "anabranch", "generate", str(folder), "--prompts", str(path), "--out", str(out),
        "--max-new-tokens", "300", "--slots", "2", "--threads", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        while process.poll() is None and not (out.exists() and out.read_text().count("\n") >= 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130 and "go on with --resume" in said and "Traceback" not in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert 2 <= len(lines) < 400 and all(len(line["tokens"]) == 300 for line in lines)


def test_ctrl_c_before_the_model_is_there_claims_no_samples(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anabranch.cli.generate.run_alone", interrupted)
    result, lines = run(folder, prompts, "--max-new-tokens", "2")
    assert result.exit_code == 130 and lines == [] and "samples are in" not in result.stderr


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": }\n', [], "line 2: no JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', [], "line 3: must be"),
        ("\n", [], "holds no prompt"),
        ('{"prompt": "a"}\n', ["--samples", "2"], "samples: more than one greedy sample"),
        ('{"prompt": "a"}\n', ["--vote", "("], "vote: '(' is no regular expression"),
        ('{"prompt": "a"}\n', ["--vote", "x"], "vote: must have a group"),
        ('{"prompt": "a"}\n', ["--temperature", "-1"], "temperature"),
        ('{"prompt": "a"}\n', ["--dtype", "float8"], "dtype"),
        ('{"prompt": "a"}\n', ["--thinking-budget", "-1"], "thinking_budget"),
        ('{"prompt": "a"}\n', ["--thinking-budget", "1", "--end-of-thought", ""], "end_of_thought"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_line(
    folder: Path, tmp_path: Path, content: str, options: list[str], said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    result, lines = run(folder, path, *options)
    assert result.exit_code == 2 and said in result.stderr and not lines
    assert not (tmp_path / "out.jsonl").exists(), "nothing was begun"


def test_missing_files_are_said(folder: Path, tmp_path: Path) -> None:
    result, _ = run(folder, tmp_path / "none.txt")
    assert result.exit_code == 2 and "prompts:" in result.stderr
    (tmp_path / "p.txt").write_text("a\n")
    result, _ = run(tmp_path / "none", tmp_path / "p.txt")
    assert result.exit_code == 2 and "models are not downloaded" in result.stderr
    result, _ = run(tmp_path, tmp_path / "p.txt")
    assert result.exit_code == 2 and "holds no model" in result.stderr


def test_an_output_that_is_there_is_said_before_the_model_is_loaded(folder: Path, prompts: Path) -> None:
    assert run(folder, prompts, "--max-new-tokens", "2")[0].exit_code == 0
    broken = prompts.parent / "broken"
    broken.mkdir()
    for file in folder.glob("*.json"):
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"none")
    result, _ = run(broken, prompts)
    assert result.exit_code == 2 and "exists; go on with --resume" in result.stderr
