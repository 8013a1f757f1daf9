"""The generation benchmark on a toy model: real engines in processes of their own."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anabranch.cli.bench_generate import (
    Model,
    about_generate,
    bench_generate,
    held_rows,
    line_of,
    require_vllm,
)
from anabranch.cli.generate_cases import (
    BATCHED,
    OURS,
    TRANSFORMERS,
    VLLM,
    GenerateCase,
    full_cases,
    llama_cases,
    quick_cases,
    vllm_cases,
)
from anabranch.cli.results import write_results
from anabranch.errors import AnabranchError, ConfigError
from anabranch.training.presets import presets

# What is never measured twice alike.
TIMES = (
    "tokens_per_s", "spread", "parts", "roof_tokens_per_s", "roof_fraction", "read_gbps", "gflops", "stolen_percent",
    "resident_mib", "bound_by",
)  # fmt: skip
WANTED = {
    "engine", "dtype", "kv_dtype", "batch", "prompt_tokens", "new_tokens", "samples", "tokens_per_s", "bytes_per_token",
    "roof_fraction", "resident_mib", "kv_tokens_per_gib",
}  # fmt: skip


def test_two_engines_decode_a_toy_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()["tiny"].config).save_pretrained(tmp_path / "toy")
    cases = [
        GenerateCase(OURS, "float32", 4, 24, 9, samples=2, kv_dtype="float32"),
        GenerateCase(OURS, "float32", 2, 24, 9, kv_dtype="int8"),
        GenerateCase(TRANSFORMERS, "float32", 2, 24, 4, kv_dtype="float32"),
    ]
    toy = [Model("toy", tmp_path / "toy")]
    rows = list(bench_generate(toy, cases, None, timed_s=0.01))
    assert list(bench_generate(toy, cases, None, rows)) == []
    [again] = bench_generate(toy, cases, None, rows[1:], timed_s=0.01)
    assert {**again, **dict.fromkeys(TIMES)} == {**rows[0], **dict.fromkeys(TIMES)}
    file = tmp_path / "rows.json"
    write_results(file, rows, about_generate(quick=True))
    assert held_rows(file, quick=True) == rows
    with pytest.raises(ConfigError, match="measured with quick True"):
        held_rows(file, quick=False)
    file.write_text(file.read_text().replace('"engine"', '"motor"'))
    with pytest.raises(ConfigError, match="holds no rows"):
        held_rows(file, quick=True)
    assert [row["engine"] for row in rows] == [OURS, TRANSFORMERS, OURS], "by size, ours first"
    for row in rows:
        assert row.keys() >= WANTED
        assert row["tokens_per_s"] > 0 and row["resident_mib"] > 0
        assert row["parts"] >= 3 and row["spread"] >= 1 and str(row["tokens_per_s"]) in line_of(row)
        assert row["read_gbps"] > 0.1 and row["gflops"] > 0.1 and row["roof_fraction"] >= 0
    coded, theirs, shared = rows
    assert coded["kv_tokens_per_gib"] > 2 * theirs["kv_tokens_per_gib"]
    # Two samples share their prompt: fewer bytes a token than two prompts.
    assert shared["bytes_per_token"] < theirs["bytes_per_token"]


@pytest.mark.full
def test_generate_batch_is_timed_token_by_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()["tiny"].config).save_pretrained(tmp_path / "toy")
    case = GenerateCase(BATCHED, "float32", 2, 24, 6, kv_dtype="float32")
    [row] = bench_generate([Model("toy", tmp_path / "toy")], [case], None, timed_s=0.01)
    assert row["tokens_per_s"] > 0 and row["parts"] % 3 == 0


def test_what_fails_keeps_nothing_else_from_being_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()["tiny"].config).save_pretrained(tmp_path / "toy")
    cases = [GenerateCase(engine, "float32", 1, 24, 4, kv_dtype="float32") for engine in (OURS, VLLM)]
    rows = bench_generate([Model("toy", tmp_path / "toy")], cases, Path(sys.executable), timed_s=0.01)
    assert next(rows)["engine"] == OURS
    # This Python has no vLLM: its process says so.
    with pytest.raises(AnabranchError, match=r"(?s)1 cases failed.*No module named 'vllm'"):
        next(rows)


VLLM_DOUBLE = """
class SamplingParams:
    def __init__(self, **given):
        self.n, self.most = given["n"], given["max_tokens"]

class Chain:
    def __init__(self, index):
        self.index, self.token_ids = index, []

class Output:
    def __init__(self, request, chains):
        self.request_id, self.outputs = request, chains

class LLM:
    def __init__(self, model, **given):
        print("a line of its log")
        self.llm_engine, self.running = self, {}

    def add_request(self, request, prompt, settings):
        self.running[request] = [Chain(i) for i in range(settings.n)]

    def step(self):
        for chains in self.running.values():
            for chain in chains:
                chain.token_ids.append(0)
        return [Output(*one) for one in self.running.items()]

    def abort_request(self, requests):
        self.running = {}

    def has_unfinished_requests(self):
        return bool(self.running)
"""


def test_a_process_of_another_python_measures_what_it_is_told(tmp_path: Path) -> None:
    """With a double of vLLM, which is not installed here: what passes between the processes is real."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(presets()["tiny"].config).save_pretrained(tmp_path / "toy")
    (tmp_path / "doubles").mkdir()
    (tmp_path / "doubles" / "vllm.py").write_text(VLLM_DOUBLE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "doubles"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    require_vllm(python)
    cases = [
        GenerateCase(VLLM, "float32", b, 24, 6, samples=s, kv_dtype="float32") for b, s in ((2, 1), (4, 2))
    ]
    rows = list(bench_generate([Model("toy", tmp_path / "toy")], cases, python, timed_s=0.001))
    assert [row["batch"] for row in rows] == [2, 4]
    assert all(row["tokens_per_s"] > 0 and row["parts"] % 3 == 0 for row in rows)


def test_cases_are_distinct_and_cover_what_is_promised() -> None:
    for cases in (quick_cases(), full_cases()):
        assert len(set(cases)) == len(cases)
    full = [case for case in full_cases() if case.engine == OURS]
    assert {case.batch for case in full} == {1, 8, 32, 128}
    assert {case.prompt_tokens for case in full} == {128, 1024}
    assert {case.dtype for case in full} == {"bfloat16", "float32", "int8"}
    assert max(case.new_tokens for case in full) == 4096 and any(case.samples == 8 for case in full)
    theirs = [case for case in full_cases() if case.engine == TRANSFORMERS]
    assert any(case.samples == 8 for case in theirs) and max(case.new_tokens for case in theirs) == 4096
    llama = llama_cases(full_cases())
    assert {case.kv_dtype for case in llama} == {"float16", "float32"} and len(set(llama)) == len(llama)
    assert all(case.engine == VLLM and case.dtype != "int8" for case in vllm_cases(full_cases()))


def test_a_python_without_vllm_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot import vllm"):
        require_vllm(Path(sys.executable))
