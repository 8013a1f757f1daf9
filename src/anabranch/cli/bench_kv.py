"""`anabranch bench kv`: what each KV policy does to a trained model while it decodes, and what it saves.

Held-out text is decoded token by token, the text's own token taking the place of the chosen one, so that all policies
see the same chains. Each distribution is compared with that of full KV by their KL divergence.

A *needle* is a name of the text (a word of at least 6 letters, digits and underscores, of at least 2 tokens) that was
last written while decoding, at least a quarter of the chain before. Its first token is given; it is found where each
other token of it is the most probable one.

Shape suffixes: N tokens of a chain, V vocabulary.
"""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anabranch.cli.device import quiet
from anabranch.cli.launch import launch
from anabranch.errors import DataError
from anabranch.scheduling.chain import Chain, Request
from anabranch.scheduling.eviction import LEAST
from anabranch.scheduling.scheduler import Limits, Part
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.kv_figures import GIB, kv_figures
from anabranch.serving.loading import load_model, load_tokenizer
from anabranch.serving.pools import kv_shape_of
from anabranch.serving.step.base import Outputs
from anabranch.training.config import RunConfig
from anabranch.training.sources import STDLIB, read_documents, split_documents

NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]{5,}")
PROMPT_TOKENS = 64
MAX_BYTES = 24_000_000
# What chains are counted for.
CHAIN_TOKENS, CHAIN_MEMORY = 4096, 2 * GIB


class Policy(NamedTuple):
    """share: of a chain's tokens that stay; 1 for all."""

    name: str
    kv_dtype: str
    share: float = 1.0

    def above(self, tokens: int) -> int | None:
        """What `evict_above` is for chains of so many tokens."""
        return None if self.share == 1 else max(LEAST, int(self.share * tokens))


POLICIES = (
    Policy("full", "float32"),
    Policy("bf16", "bfloat16"),
    Policy("int8", "int8"),
    Policy("int4", "int4"),
    Policy("evict 1/2", "float32", 1 / 2),
    Policy("evict 1/4", "float32", 1 / 4),
    Policy("evict 1/2 + int8", "int8", 1 / 2),
    Policy("evict 1/4 + int8", "int8", 1 / 4),
    Policy("evict 1/4 + int4", "int4", 1 / 4),
)


class Window(NamedTuple):
    """The beginning of a held-out document. needles: the places of the tokens to find, a needle each."""

    tokens: tuple[int, ...]
    needles: list[list[int]]


def train_tiny(steps: int, folder: Path, tokens: int) -> Path:
    """The preset `tiny`, trained on the standard library in windows of so many tokens."""
    config = RunConfig(
        model="tiny", ranks=1, batch_size=4, steps=steps, sequence_length=tokens, learning_rate=4e-3,
        out=str(folder), save_every=0, eval_every=0,
    )  # fmt: skip
    launch("train", config.to_dict(), config.ranks)
    return folder / "model"


def bench_kv(folder: Path, tokens: int, chains: int) -> Iterator[dict[str, Any]]:
    """A row a policy, full KV first. tokens: of a chain. chains: documents at most."""
    quiet()
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    texts = [
        document.text for document in split_documents(read_documents(STDLIB, max_bytes=MAX_BYTES)).validation
    ]
    windows = [window for text in texts if (window := _window(text, tokenizer, tokens)) is not None][:chains]
    if not windows:
        raise DataError(f"no held-out document has {tokens} tokens: ask for fewer", setting="tokens")
    full: list[Tensor] | None = None
    for policy in POLICIES:
        settings = _settings(policy, tokens, len(windows), model)
        logprobs, seconds, evicted = decode_text(model, settings, windows)
        full = full or logprobs
        yield {
            "policy": policy.name,
            "kv_dtype": policy.kv_dtype,
            "evict_above": settings.evict_above,
            "chains": len(windows),
            "chain_tokens": tokens,
            **_agreement(full, logprobs, windows),
            **_found(logprobs, windows),
            **_savings(policy, settings, model),
            "evicted_share": round(evicted / (len(windows) * tokens), 3),
            "tokens_per_s": round(len(windows) * (tokens - PROMPT_TOKENS) / seconds, 1),
        }


def _settings(policy: Policy, tokens: int, chains: int, model: PreTrainedModel) -> EngineSettings:
    mib = -(-chains * (tokens + 32) * kv_shape_of(model).page_bytes("float32") // 16 // (1 << 20))
    return EngineSettings(
        kv_dtype=policy.kv_dtype, evict_above=policy.above(tokens), kv_memory_mib=mib, step="native",
        limits=Limits(chains, PROMPT_TOKENS * chains, tokens),
    )  # fmt: skip


def _window(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Window | None:
    """None for a text that is too short."""
    encoded = tokenizer(text[: 20 * tokens], return_offsets_mapping=True)
    ids, spans = encoded["input_ids"][:tokens], encoded["offset_mapping"][:tokens]
    if len(ids) < tokens:
        return None
    return Window(tuple(ids), find_needles(text, spans, tokens // 4))


def find_needles(text: str, spans: Sequence[tuple[int, int]], distance: int) -> list[list[int]]:
    """spans: of each token, its characters in `text`. A name's tokens after its first, for each needle."""
    starts = {start: i for i, (start, end) in enumerate(spans) if end > start}
    last: dict[str, int] = {}
    needles: list[list[int]] = []
    for name in NAME.finditer(text, 0, spans[-1][1]):
        first = starts.get(name.start())
        if first is None:  # a token holds what is before the name too
            first = max((i for start, i in starts.items() if start < name.start()), default=0)
        inside = [i for i in range(first + 1, len(spans)) if spans[i][1] <= name.end()]
        before = last.get(name.group())
        if before is not None and before >= PROMPT_TOKENS and first - before >= distance and inside:
            needles.append(inside)
        last[name.group()] = first
    return needles


def decode_text(
    model: PreTrainedModel, settings: EngineSettings, windows: Sequence[Window]
) -> tuple[list[Tensor], float, int]:
    """Of each window the log-probabilities (N, V) of the tokens after its prompt, decoded one by one; seconds of
    the engine's own; tokens evicted."""
    new = len(windows[0].tokens) - PROMPT_TOKENS
    kept: dict[Chain, list[Tensor]] = {}
    seconds = 0.0

    def keep(parts: Sequence[Part], outputs: Outputs) -> None:
        nonlocal seconds
        started = time.perf_counter()
        for row, part in enumerate(part for part in parts if part.last):
            kept[part.chain].append(outputs.logits_WV[row].log_softmax(-1))
        seconds -= time.perf_counter() - started

    with Engine(model, settings) as engine:
        engine.watchers.append(keep)
        for window in windows:
            (chain,) = engine.submit(Request(window.tokens[:PROMPT_TOKENS], new))
            kept[chain] = []
        while not engine.scheduler.idle:
            started = time.perf_counter()
            got = engine.advance()
            seconds += time.perf_counter() - started
            for chain, window in zip(kept, windows, strict=True):
                if chain in got:
                    chain.tokens[-1] = window.tokens[len(chain.tokens) - 1]
        engine.check()
        return [torch.stack(rows) for rows in kept.values()], seconds, engine.scheduler.tally.evicted


def _agreement(full: Sequence[Tensor], other: Sequence[Tensor], windows: Sequence[Window]) -> dict[str, Any]:
    """late: of the last quarter of the chains, where most has left."""
    kl, late, same, nll = [], [], [], []
    for p_NV, q_NV, window in zip(full, other, windows, strict=True):
        kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
        kl.append(kl_N)
        late.append(kl_N[-len(window.tokens) // 4 :])
        same.append((p_NV.argmax(-1) == q_NV.argmax(-1)).float())
        nll.append(-q_NV.gather(1, torch.tensor(window.tokens[PROMPT_TOKENS:])[:, None])[:, 0])
    means = {"kl": kl, "kl_late": late, "same_best_token": same, "nll": nll}
    return {name: float(f"{float(torch.cat(of).mean()):.4g}") for name, of in means.items()}


def _found(logprobs: Sequence[Tensor], windows: Sequence[Window]) -> dict[str, Any]:
    found: list[bool] = []
    nll: list[float] = []
    for logprobs_NV, window in zip(logprobs, windows, strict=True):
        for needle in window.needles:
            wanted = torch.tensor([window.tokens[i] for i in needle])
            rows_NV = logprobs_NV[torch.tensor(needle) - PROMPT_TOKENS]
            found.append(bool((rows_NV.argmax(-1) == wanted).all()))
            nll.append(-float(rows_NV.gather(1, wanted[:, None]).mean()))
    count = len(found)
    return {
        "needles": count,
        "needles_found": round(sum(found) / count, 4) if count else None,
        "needle_nll": round(sum(nll) / count, 4) if count else None,
    }


def _savings(policy: Policy, settings: EngineSettings, model: PreTrainedModel) -> dict[str, Any]:
    """Chains are counted for the share of tokens that was measured, at the length that is asked for."""
    longer = EngineSettings(kv_dtype=settings.kv_dtype, evict_above=policy.above(CHAIN_TOKENS))
    figures = kv_figures(kv_shape_of(model), "float32", longer, CHAIN_TOKENS, CHAIN_MEMORY)
    return {
        "kv_bytes_per_token": figures.bytes_per_token,
        "chains_4k_in_2_gib": figures.chains,
        "open_mib": figures.open_mib,
    }
