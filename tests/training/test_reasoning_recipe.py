"""The recipe that improves a model's sums by GRPO: its problems, and the whole of it in small."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipes.arithmetic import (
    EOS,
    MAX_NEW_TOKENS,
    answer,
    encode,
    problems,
    solution,
    solved,
    tokenizer,
    unseen,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.scheduling.chain import Request
from anabranch.serving.engine import Engine, EngineSettings

ROOT = Path(__file__).resolve().parent.parent.parent


def test_worked_solutions_are_right() -> None:
    for problem in problems(5, 200):
        worked = solution(problem)
        assert len(worked) <= MAX_NEW_TOKENS
        assert solved(problem, answer(worked))
        assert not solved(problem, answer(worked[:-1]))
        assert not solved(problem, answer([*worked[:-1], *encode("7"), EOS]))


def test_the_tokenizer_reads_what_the_problems_hold(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    kept = AutoTokenizer.from_pretrained(tmp_path)
    for problem in problems(5, 20):
        whole = [*problem.prompt, *solution(problem)]
        assert kept.decode(whole).startswith(problem.expression + "=<think>")
        assert kept(kept.decode(whole)).input_ids == whole


def test_no_judged_problem_is_learnt_from() -> None:
    """One of five sums of two small numbers is among 256 problems; their seeds differ all the same."""
    judged, others = problems(0, 256), problems(10_000_000, 512)
    left = unseen(others, judged)
    assert 0.5 * len(others) < len(left) < 0.98 * len(others)
    assert not {p.expression for p in left} & {p.expression for p in judged}


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    command = [sys.executable, "-m", "recipes.reasoning_grpo", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def run(out: Path, *more: str) -> None:
    command = [sys.executable, "-m", "recipes.reasoning_grpo", "--quick", "--out", str(out), *more]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, capture_output=True)


@pytest.mark.full
def test_the_recipe_runs_and_its_figures_reproduce(tmp_path: Path) -> None:
    once = tmp_path / "once"
    run(once)
    first = json.loads((once / "report.json").read_text())
    for judged in (first["before"], first["after"]):
        assert judged["mismatch_invariant"] == 0.0
        assert 0 <= judged["pass@1"] <= judged["pass@8"] <= 1
    again = tmp_path / "again"
    (again / "pretrained").parent.mkdir()
    shutil.copytree(once / "pretrained", again / "pretrained")
    run(again, "--resume")
    second = json.loads((again / "report.json").read_text())
    assert second["grpo_solved"] == first["grpo_solved"]
    assert second["after"]["pass@1"] == first["after"]["pass@1"]
    problem = problems(0, 1)[0]
    with Engine(
        AutoModelForCausalLM.from_pretrained(once / "grpo"), EngineSettings(kv_memory_mib=8)
    ) as engine:
        (done,) = engine.generate([Request(problem.prompt, MAX_NEW_TOKENS, stop_tokens=frozenset({EOS}))])
    assert done.tokens
