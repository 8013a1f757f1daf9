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
    require_vllm,
)
from anabranch.cli.generate_cases import (
    OURS,
    TRANSFORMERS,
    VLLM,
    GenerateCase,
    full_cases,
    quick_cases,
    vllm_cases,
)
from anabranch.cli.generate_engines import rate_of_runs
from anabranch.cli.results import write_results
from anabranch.errors import ConfigError
from anabranch.training.presets import presets

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
    rows = [row for more in bench_generate(toy, cases, None) for row in more]
    assert list(bench_generate(toy, cases, None, rows)) == []
    file = tmp_path / "rows.json"
    write_results(file, rows, about_generate(quick=True))
    assert held_rows(file, quick=True) == rows
    with pytest.raises(ConfigError, match="measured with quick True"):
        held_rows(file, quick=False)
    file.write_text(file.read_text().replace('"engine"', '"motor"'))
    with pytest.raises(ConfigError, match="holds no rows"):
        held_rows(file, quick=True)
    assert [row["engine"] for row in rows] == [OURS, OURS, TRANSFORMERS]
    for row in rows:
        assert row.keys() >= WANTED
        assert row["tokens_per_s"] > 0 and row["resident_mib"] > 0
        assert row["read_gbps"] > 0.1 and row["gflops"] > 0.1 and row["roof_fraction"] >= 0
    assert rows[1]["kv_tokens_per_gib"] > 2 * rows[0]["kv_tokens_per_gib"]
    # Two samples share their prompt: fewer bytes a token than two prompts.
    assert rows[0]["bytes_per_token"] < rows[2]["bytes_per_token"]


def test_a_rate_is_of_the_tokens_after_the_first_and_without_the_first_run() -> None:
    case = GenerateCase(TRANSFORMERS, batch=10, new_tokens=5)
    rate = rate_of_runs(case, one_s=[9.0, 1.0, 1.0, 1.0], all_s=[9.0, 3.0, 3.0, 5.0], resident_mib=1.0)
    assert rate.tokens_per_s == 20.0 and rate.spread == 2.0


def test_cases_are_distinct_and_cover_what_is_promised() -> None:
    for cases in (quick_cases(), full_cases()):
        assert len(set(cases)) == len(cases)
    full = [case for case in full_cases() if case.engine == OURS]
    assert {case.batch for case in full} == {1, 8, 32, 128}
    assert {case.prompt_tokens for case in full} == {128, 1024}
    assert {case.dtype for case in full} == {"bfloat16", "float32", "int8"}
    assert max(case.new_tokens for case in full) == 4096 and any(case.samples == 8 for case in full)
    assert all(case.engine == VLLM and case.dtype != "int8" for case in vllm_cases(full_cases()))


def test_a_python_without_vllm_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot import vllm"):
        require_vllm(Path(sys.executable))
