"""One engine at a time decodes: tokens a second with all chains running, and the memory it then holds.

Each is timed once every prompt is in, over some parts of the new tokens. `generate_batch` of transformers cannot be
stopped there: of it a run of many new tokens less a run of one is timed, both on prompts that it has not seen before.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from anabranch.cli.generate_cases import (
    BATCHED,
    CHUNK,
    LLAMA,
    OURS,
    TRANSFORMERS,
    GenerateCase,
    entering_tokens,
    prompts_of,
)
from anabranch.cli.llama_decode import llama_rounds
from anabranch.cli.roofs import higher, measure_roof
from anabranch.scheduling.chain import Request
from anabranch.scheduling.pages import PAGE, pages_of
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.telemetry.memory import resident_bytes

MIB = 1 << 20
# Parts of a run: their median counts, and their spread is told.
ROUNDS = 3


class Rate(NamedTuple):
    """tokens_per_s: decoded, of all chains together. spread: largest over smallest of the rounds."""

    tokens_per_s: float
    spread: float
    resident_mib: float


def measure_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one process: the rates of `cases`, all of one engine and one dtype, each with what the machine could
    do at most before and after it."""
    cases = [GenerateCase.from_dict(case) for case in settings["cases"]]
    rates, roofs = list[Rate](), [measure_roof(cases[0].dtype)]
    for rate in ENGINES[cases[0].engine](Path(settings["model"]), cases):
        rates.append(rate)
        roofs.append(measure_roof(cases[0].dtype))
    return {
        "rates": [rate._asdict() for rate in rates],
        "roofs": [asdict(higher(*around)) for around in pairwise(roofs)],
    }


def _ours(folder: Path, cases: list[GenerateCase]) -> Iterator[Rate]:
    dtype = "bfloat16" if cases[0].dtype == "int8" else cases[0].dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    yield from (_ours_once(folder, model, case) for case in cases)


def _ours_once(folder: Path, model: Any, case: GenerateCase) -> Rate:
    tokens = case.prompt_tokens + case.new_tokens + entering_tokens(case)
    prompts = prompts_of(folder, case.batch // case.samples, case.prompt_tokens)
    sampling = Sampling() if case.samples == 1 else Sampling(temperature=1.0)
    settings = EngineSettings(
        case.dtype,
        case.kv_dtype,
        kv_memory_mib=_kv_mib(model.config, case, pages_of(tokens) * PAGE),
        step="native",
        limits=Limits(case.batch, CHUNK, tokens),
    )
    with Engine(model, settings) as engine:
        for prompt in prompts:
            engine.submit(Request(tuple(prompt), tokens - case.prompt_tokens, case.samples, sampling))
        while len(engine.advance()) < case.batch:
            pass
        part = max(1, case.new_tokens // ROUNDS)
        rates: list[float] = []
        for _ in range(ROUNDS):
            began_s = time.perf_counter()
            decoded = sum(len(engine.advance()) for _ in range(part))
            rates.append(decoded / (time.perf_counter() - began_s))
        return rate_of_parts(rates, resident_bytes() / MIB)


def _kv_mib(config: Any, case: GenerateCase, tokens: int) -> int:
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    width = {"float32": 4.0, "bfloat16": 2.0}.get(case.kv_dtype, 1.5)
    return int(case.batch * tokens * numbers * width) // MIB + 16


def _transformers(folder: Path, cases: list[GenerateCase]) -> Iterator[Rate]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=cases[0].dtype).eval()

    yield from (_transformers_once(folder, model, case) for case in cases)


class _Clock(StoppingCriteria):
    """Stops nothing: notes when each token of all chains is there."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _transformers_once(folder: Path, model: Any, case: GenerateCase) -> Rate:
    ids, clock = torch.tensor(prompts_of(folder, case.batch, case.prompt_tokens)), _Clock()
    part = max(1, case.new_tokens // ROUNDS)
    tokens = 1 + ROUNDS * part  # the first has the prompts before it
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, stopping_criteria=[clock],
    )  # fmt: skip
    marks_s = clock.times_s[::part]
    return rate_of_parts(
        [case.batch * part / (end - begin) for begin, end in pairwise(marks_s)], resident_bytes() / MIB
    )


def _transformers_batch(folder: Path, cases: list[GenerateCase]) -> Iterator[Rate]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=cases[0].dtype, attn_implementation="paged|sdpa"
    ).eval()

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
        )
        model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)

    yield from (_difference(folder, case, run) for case in cases)


def _llama_cpp(folder: Path, cases: list[GenerateCase]) -> Iterator[Rate]:
    rounds = llama_rounds(folder, cases, ROUNDS, os.cpu_count() or 1)
    yield from (rate_of_parts(rates, resident_bytes() / MIB) for rates in rounds)


def _difference(folder: Path, case: GenerateCase, run: Callable[[list[list[int]], int], None]) -> Rate:
    took: dict[int, list[float]] = {1: [], case.new_tokens: []}
    prompts = prompts_of(folder, 2 * (ROUNDS + 1) * case.batch, case.prompt_tokens)
    for _ in range(ROUNDS + 1):
        for new_tokens, seconds in took.items():
            mine, prompts = prompts[: case.batch], prompts[case.batch :]
            began_s = time.perf_counter()
            run(mine, new_tokens)
            seconds.append(time.perf_counter() - began_s)
    return rate_of_runs(case, took[1], took[case.new_tokens], resident_bytes() / MIB)


def rate_of_runs(case: GenerateCase, one_s: list[float], all_s: list[float], resident_mib: float) -> Rate:
    """By what a run of all new tokens takes longer than a run of one. The first of each is a warm-up."""
    decoded = case.batch * (case.new_tokens - 1)
    prefill_s = statistics.median(one_s[1:])
    return rate_of_parts([decoded / max(s - prefill_s, 1e-9) for s in all_s[1:]], resident_mib)


def rate_of_parts(rates: list[float], resident_mib: float) -> Rate:
    """rates: tokens a second of each part."""
    return Rate(statistics.median(rates), max(rates) / min(rates), resident_mib)


ENGINES: dict[str, Callable[[Path, list[GenerateCase]], Iterator[Rate]]] = {
    OURS: _ours,
    TRANSFORMERS: _transformers,
    BATCHED: _transformers_batch,
    LLAMA: _llama_cpp,
}
