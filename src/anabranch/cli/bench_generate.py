"""`anabranch bench generate`: how fast engines decode, beside what this machine could do at most."""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from anabranch.cli.cluster_book import comparable, rows_of
from anabranch.cli.generate_cases import (
    TRAINED,
    VLLM,
    GenerateCase,
    Sizes,
    entering_tokens,
    fit,
    prompts_of,
    sizes_of,
)
from anabranch.cli.generate_engines import ROUNDS, Rate, rate_of_parts
from anabranch.cli.launch import launch
from anabranch.cli.roofs import higher, measure_roof
from anabranch.costs.decode import Roof, decode_bound
from anabranch.errors import AnabranchError, ConfigError
from anabranch.scheduling.pages import PAGE
from anabranch.serving.loading import load_config, positions_of
from anabranch.training.config import RunConfig

GIB = 1 << 30
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}
TRAIN_STEPS = 60
VLLM_S = 7200
# Where the code of a row starts.
ENTRIES = ("anabranch.cli.bench_generate", "anabranch.cli.generate_engines")


class Model(NamedTuple):
    """A folder that every engine loads. name: RANDOM or TRAINED."""

    name: str
    folder: Path


def bench_generate(
    models: list[Model],
    cases: list[GenerateCase],
    vllm_python: Path | None,
    held: Sequence[dict[str, Any]] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Rows, as engines come to be measured: each in a process of its own, those of one dtype one after the other.

    Roofs are measured before and after each case, for what a shared machine can do changes within minutes. vLLM runs
    all cases of a dtype without us: theirs are measured before and after all of them.
    held: rows of an interrupted run; what has some is not measured again.
    """
    known = {(row["model"], row["engine"], row["dtype"]) for row in held}
    for model in models:
        sizes, most = sizes_of(model.folder), positions_of(load_config(model.folder))
        groups: dict[tuple[str, str], list[GenerateCase]] = {}
        for case in sorted((fit(case, most) for case in cases), key=lambda c: c.dtype):
            groups.setdefault((case.engine, case.dtype), []).append(case)
        for (engine, dtype), group in groups.items():
            if (model.name, engine, dtype) in known:
                continue
            if engine == VLLM:
                assert vllm_python is not None
                before = measure_roof(dtype)
                rates = vllm_rates(model.folder, group, vllm_python)
                roofs = [higher(before, measure_roof(dtype))] * len(group)
            else:
                settings = {"model": str(model.folder), "cases": [asdict(case) for case in group]}
                told = launch("measure_generate", settings, 1)
                rates = [Rate(**rate) for rate in told["rates"]]
                roofs = [Roof(**roof) for roof in told["roofs"]]
            yield [_row(model, sizes, *one) for one in zip(group, rates, roofs, strict=True)]


def held_rows(json_file: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Rows that an interrupted benchmark left in the file. Raises ConfigError as `rows_of`."""

    def judge(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if not {"model", "engine", "dtype"} <= row.keys() or not 0 < row["tokens_per_s"] < math.inf:
                raise ValueError("a row is of something else")

    return rows_of(json_file, about_generate(quick), judge)


def about_generate(quick: bool) -> dict[str, Any]:
    """What rows of one file have in common."""
    return comparable({"quick": quick}, ENTRIES)


def _row(model: Model, sizes: Sizes, case: GenerateCase, rate: Rate, roof: Roof) -> dict[str, Any]:
    kv_bytes = sizes.kv.page_bytes(case.kv_dtype) / PAGE
    # Half of the new tokens are cached in the mean; prompts that samples share are read once.
    cached = case.batch * (case.prompt_tokens / case.samples + case.new_tokens / 2)
    bound = decode_bound(sizes.decode, roof, case.batch, cached, WEIGHT_BYTES[case.dtype], kv_bytes)
    return {
        "model": model.name,
        **asdict(case),
        "tokens_per_s": round(rate.tokens_per_s, 1),
        "spread": round(rate.spread, 3),
        "bytes_per_token": round(bound.read_bytes / case.batch),
        "roof_tokens_per_s": round(1e3 * case.batch / bound.step_ms, 1),
        "roof_fraction": round(rate.tokens_per_s * bound.step_ms / 1e3 / case.batch, 4),
        "bound_by": bound.by,
        "read_gbps": round(roof.read_gbps, 1),
        "gflops": round(roof.gflops, 1),
        "resident_mib": round(rate.resident_mib),
        "kv_tokens_per_gib": round(GIB / kv_bytes),
    }


def vllm_rates(folder: Path, cases: list[GenerateCase], python: Path) -> list[Rate]:
    """Of an environment that has vLLM. Raises AnabranchError with the end of what it said where it fails."""
    job = {
        "model": str(folder),
        "dtype": cases[0].dtype,
        "rounds": ROUNDS,
        "tokens": max(case.prompt_tokens + case.new_tokens + entering_tokens(case) for case in cases),
        "chains": max(case.batch for case in cases),
        "cases": [
            {
                **asdict(case),
                "most_tokens": case.new_tokens + entering_tokens(case),
                "prompts": prompts_of(folder, case.batch // case.samples, case.prompt_tokens),
            }
            for case in cases
        ],
    }
    script = Path(__file__).parent / "vllm_decode.py"
    with tempfile.TemporaryDirectory(prefix="anabranch-vllm-") as name:
        told = Path(name) / "told.json"
        file = Path(name) / "job.json"
        file.write_text(json.dumps({**job, "told": str(told)}))
        # On CPU vLLM keeps one core for itself unless told which to use.
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        try:
            done = subprocess.run(
                [str(python), str(script), str(file)], capture_output=True, text=True, timeout=VLLM_S, check=False,
                env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "4"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise AnabranchError(f"vLLM has not ended in {VLLM_S} s") from None
        if done.returncode or not told.exists():
            raise AnabranchError(f"vLLM ended with {done.returncode}: {done.stderr[-1500:]}")
        return [rate_of_parts(**one) for one in json.loads(told.read_text())]


def require_vllm(python: Path | None) -> None:
    """Raise ConfigError where an interpreter was named that has no vLLM."""
    if python is not None:
        found = subprocess.run([str(python), "-c", "import vllm"], capture_output=True, check=False)
        if found.returncode:
            raise ConfigError(f"{python} cannot import vllm; name one that can", setting="vllm_python")


def train_small(folder: Path) -> Path:
    """The preset `small`, trained for some steps on the standard library; a folder that has it is taken as it is."""
    out = folder / "small"
    if not (out / "model" / "config.json").exists():
        config = RunConfig(
            model=TRAINED,
            ranks=1,
            steps=TRAIN_STEPS,
            out=str(out),
            save_every=0,
            eval_every=0,
            dtype="bfloat16",
        )
        launch("train", config.to_dict(), 1)
    return out / "model"
