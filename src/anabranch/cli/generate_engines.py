"""One engine decodes one case: tokens a second with all chains running, and the memory it then holds.

A run is timed once every prompt is in, in some parts of its new tokens; runs go on until so many seconds were timed,
for a few dozen steps of one chain are over in the blink of an eye.
"""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
from transformers.generation.configuration_utils import ContinuousBatchingConfig

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
from anabranch.cli.llama_decode import loaded
from anabranch.cli.roofs import measure_roof, typical
from anabranch.costs.decode import Roof
from anabranch.errors import AnabranchError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.pages import PAGE, pages_of
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.loading import load_config
from anabranch.telemetry.memory import resident_bytes

MIB = 1 << 20
# Parts of a run, and turns of a case, which are whole runs: before each of these, and at the end, roofs are measured.
ROUNDS, TURNS = 3, 4

# Runs a case once: when so many tokens of all chains were there, from the first of every chain on.
Mark = tuple[float, int]
Runner = Callable[[], list[Mark]]


class Rate(NamedTuple):
    """tokens_per_s: decoded, of all chains together, the median of so many parts. spread: their quartiles' ratio."""

    tokens_per_s: float
    spread: float
    parts: int
    resident_mib: float


class Turn(NamedTuple):
    """Runs between two measurements of the roofs. roof: the mean of both."""

    tokens_per_s: float
    roof: Roof


def measure_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one process: the rate of one case, and its turns."""
    case = GenerateCase(**settings["case"])
    torch.set_num_threads(os.cpu_count() or 1)
    with ENGINES[case.engine](Path(settings["model"]), case) as run:
        rates, turns, spent_s, before = list[float](), list[Turn](), 0.0, measure_roof(case.dtype)
        while spent_s < settings["timed_s"]:
            mine: list[float] = []
            while not mine or spent_s < (len(turns) + 1) * settings["timed_s"] / TURNS:
                marks = run()
                mine += [(n - n0) / (s - s0) for (s0, n0), (s, n) in pairwise(marks)]
                spent_s += marks[-1][0] - marks[0][0]
            after = measure_roof(case.dtype)
            turns.append(Turn(statistics.median(mine), typical([before, after])))
            rates, before = rates + mine, after
        rate = rate_of_parts(rates, held_mib())._asdict()
        return {"rate": rate, "turns": [(turn.tokens_per_s, asdict(turn.roof)) for turn in turns]}


def rate_of_parts(rates: list[float], resident_mib: float) -> Rate:
    """rates: tokens a second of each part."""
    low, _, high = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
    return Rate(statistics.median(rates), high / low, len(rates), resident_mib)


def held_mib() -> float:
    """Of this process now: what it has freed goes back to the system first, which our ranks else put off."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes() / MIB


def part_of(case: GenerateCase) -> int:
    """New tokens of a chain in one part."""
    return max(1, case.new_tokens // ROUNDS)


@contextmanager
def _ours(folder: Path, case: GenerateCase) -> Iterator[Runner]:
    tokens = case.prompt_tokens + case.new_tokens + entering_tokens(case)
    prompts = prompts_of(folder, case.batch // case.samples, case.prompt_tokens)
    sampling = Sampling() if case.samples == 1 else Sampling(temperature=1.0)
    settings = EngineSettings(
        case.dtype, case.kv_dtype, kv_memory_mib=_kv_mib(folder, case, pages_of(tokens) * PAGE), step="native",
        threads=os.cpu_count(), limits=Limits(case.batch, CHUNK, tokens),
    )  # fmt: skip
    with Engine.from_folder(folder, settings) as engine:

        def advance() -> int:
            if engine.scheduler.idle:
                raise AnabranchError("chains ended early")
            return len(engine.advance())

        def run() -> list[Mark]:
            new_tokens = tokens - case.prompt_tokens
            asked = [Request(tuple(prompt), new_tokens, case.samples, sampling) for prompt in prompts]
            chains = [chain for request in asked for chain in engine.submit(request)]
            while advance() < case.batch:
                pass
            marks = [(time.perf_counter(), 0)]
            for _ in range(ROUNDS):
                decoded = sum(advance() for _ in range(part_of(case)))
                marks.append((time.perf_counter(), marks[-1][1] + decoded))
            for chain in chains:
                engine.cancel(chain)
            return marks

        # Prompts stay in the prefix tree: in all that is timed chains begin together, with what they were given.
        engine.generate([Request(tuple(prompt), 1) for prompt in prompts])
        yield run


def _kv_mib(folder: Path, case: GenerateCase, tokens: int) -> int:
    config: Any = load_config(folder)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    width = {"float32": 4.0, "bfloat16": 2.0}.get(case.kv_dtype, 1.5)
    return int(case.batch * tokens * numbers * width) // MIB + 16


class _Clock(StoppingCriteria):
    """Stops nothing: notes when each token of all chains is there."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _transformers(folder: Path, case: GenerateCase) -> Iterator[Runner]:
    """Samples of a prompt are the prompt so often: it has no sharing of its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=case.dtype).eval()
    prompts = prompts_of(folder, case.batch // case.samples, case.prompt_tokens)
    ids = torch.tensor(prompts).repeat_interleave(case.samples, dim=0)
    tokens = 1 + ROUNDS * part_of(case)  # the first has the prompts before it
    how: dict[str, Any] = {"do_sample": True, "top_k": 0} if case.samples > 1 else {"do_sample": False}

    def run() -> list[Mark]:
        clock = _Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            pad_token_id=0, stopping_criteria=[clock], **how,
        )  # fmt: skip
        return _marks(case, clock.times_s)

    yield run


@contextmanager
def _transformers_batch(folder: Path, case: GenerateCase) -> Iterator[Runner]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=case.dtype, attn_implementation="paged|sdpa"
    ).eval()
    prompts = prompts_of(folder, case.batch, case.prompt_tokens)
    tokens = 1 + ROUNDS * part_of(case) + entering_tokens(case)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
    )
    page = 256
    # Twice what they fill: with one to spare the last chain waits until another has ended.
    blocks = 2 * case.batch * -(-(case.prompt_tokens + tokens) // page)
    room = ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=CHUNK)

    def run() -> list[Mark]:
        done = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=room, record_timestamps=True
        )
        times_s: list[list[float]] = [output.timestamps or [] for output in done.values()]
        if len(times_s) != case.batch or any(len(times) < tokens for times in times_s):
            raise AnabranchError(f"generate_batch ended with {len(times_s)} of {case.batch} chains")
        begun_s = max(times[0] for times in times_s)
        # From when the last chain has its first token on: of each chain the tokens since then.
        steps_s = sorted(time_s for times in times_s for time_s in times if time_s >= begun_s)
        return _marks(case, steps_s[:: case.batch])

    yield run


def _marks(case: GenerateCase, times_s: list[float]) -> list[Mark]:
    """times_s: when every chain had one more token."""
    part = part_of(case)
    return [(times_s[i * part], i * part * case.batch) for i in range(ROUNDS + 1)]


@contextmanager
def _llama_cpp(folder: Path, case: GenerateCase) -> Iterator[Runner]:
    prompts = prompts_of(folder, case.batch, case.prompt_tokens)
    with loaded(folder, case.dtype, os.cpu_count() or 1) as model, ExitStack() as running:

        def run() -> list[Mark]:
            running.close()
            # Open until the next run, or until its memory was looked at.
            steps = running.enter_context(closing(model.decode(case, prompts)))
            next(steps)
            times_s = [time.perf_counter()]
            for _ in range(ROUNDS * part_of(case)):
                next(steps)
                times_s.append(time.perf_counter())
            return _marks(case, times_s)

        yield run


ENGINES: dict[str, Callable[[Path, GenerateCase], AbstractContextManager[Runner]]] = {
    OURS: _ours,
    TRANSFORMERS: _transformers,
    BATCHED: _transformers_batch,
    LLAMA: _llama_cpp,
}
