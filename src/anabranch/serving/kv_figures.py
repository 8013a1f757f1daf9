"""What a KV policy costs and what it is worth: bytes and chains beside the rate of problems solved under it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedModel

from anabranch.scheduling.chain import Request
from anabranch.scheduling.pages import PAGE, pages_of
from anabranch.serving.engine import Engine
from anabranch.serving.pools import KvShape, kv_shape_of
from anabranch.serving.settings import EngineSettings

GIB = 1 << 30
MIB = 1 << 20
# A chain's open pages, where pages are kept otherwise than they are written, as the engine sets them aside. (Those of
# the prompts that enter come on top: of one chunk, however many chains there are.)
OPEN_PAGES = 2


class KvFigures(NamedTuple):
    """bytes_per_token: of a token that stays. chains: of so many tokens as were asked for that fit in the memory
    that was given, as `kv_memory_mib` counts it: weights apart, and the pages still being written, open_mib of them.
    chains_with_open: of those that fit where pages still being written count too."""

    kv_dtype: str
    evict_above: int | None
    bytes_per_token: float
    chains: int
    open_mib: float
    chains_with_open: int


def kv_figures(
    shape: KvShape, dtype: str, settings: EngineSettings, tokens: int, memory_bytes: int
) -> KvFigures:
    """Of decoding chains of `tokens` tokens. dtype: of the step, in which open pages are."""
    kind = settings.kv_dtype or dtype
    page_bytes = shape.page_bytes(kind)
    held = tokens if settings.evict_above is None else min(tokens, settings.evict_above)
    chain_bytes = pages_of(held) * page_bytes
    open_bytes = 0 if kind == dtype else OPEN_PAGES * shape.page_bytes(dtype)
    chains = memory_bytes // chain_bytes
    with_open = memory_bytes // (chain_bytes + open_bytes)
    return KvFigures(
        kind, settings.evict_above, page_bytes / PAGE, chains, chains * open_bytes / MIB, with_open
    )


class Solved(NamedTuple):
    """rate: of all samples of all problems, those whose new tokens pass their check. evicted: tokens whose pages
    left. kv: of 2 GiB and the longest chain there may be. right: of each sample, in the order of problems."""

    samples: int
    rate: float
    right: tuple[bool, ...]
    new_tokens: int
    tokens_per_s: float
    evicted: int
    preempted: int
    kv: KvFigures


def solve_rate(
    model: PreTrainedModel,
    settings: EngineSettings,
    problems: Sequence[tuple[Request, Callable[[list[int]], bool]]],
) -> Solved:
    """Generate all requests under `settings` and judge each sample's new tokens by its problem's check."""
    with Engine(model, settings) as engine:
        started = time.perf_counter()
        done = engine.generate([request for request, _ in problems])
        tally = replace(engine.scheduler.tally)
        seconds = time.perf_counter() - started
        engine.check()
    done = sorted(done, key=lambda completion: (completion.request, completion.sample))
    right = tuple(problems[completion.request][1](completion.tokens) for completion in done)
    tokens = sum(len(completion.tokens) for completion in done)
    dtype = settings.dtype or str(model.dtype).removeprefix("torch.")
    step_dtype = "bfloat16" if dtype == "int8" else dtype
    kv = kv_figures(kv_shape_of(model), step_dtype, settings, settings.limits.tokens, 2 * GIB)
    rate = sum(right) / len(right)
    return Solved(len(right), rate, right, tokens, tokens / seconds, tally.evicted, tally.preempted, kv)
