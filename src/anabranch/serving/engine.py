"""The engine: requests in, chains out; the scheduler decides, a step computes, the sampler chooses.

Shape suffixes as in serving/step/base.py.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.pages import PAGE, PagePool, pages_of
from anabranch.scheduling.scheduler import Part, Scheduler
from anabranch.scheduling.speculation import Speculator
from anabranch.serving.evictor import Evictor
from anabranch.serving.loading import load_model, positions_of
from anabranch.serving.pools import FORMAT_SHIFT, FORMATS, allocate, first_page, kv_shape_of
from anabranch.serving.sampler import sample
from anabranch.serving.settings import WEIGHTS, EngineSettings
from anabranch.serving.step.base import Int32, Outputs, Rows
from anabranch.serving.step.native import NativeStep
from anabranch.serving.step_choice import choose_step
from anabranch.serving.store.arena import StoreFigures
from anabranch.serving.store.checkpoint import Checkpoint
from anabranch.serving.table import PageTable
from anabranch.serving.tiers import PageTier

MIB = 1 << 20
# Waiting chains whose pages are read ahead from a spill folder.
PREFETCHED = 2


class Completion(NamedTuple):
    """One finished sample. tokens: the new ones. logprobs: of each under the model, before any sampling setting;
    None for one that was forced."""

    request: int
    sample: int
    tokens: list[int]
    logprobs: list[float | None]
    end: End


class Engine:
    """Serves one model in this process. Close it, or use it as a context, to give its memory back."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: EngineSettings | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """checkpoint: what `model`, its skeleton, has its weights in; only under a memory limit."""
        self.settings = settings or EngineSettings()
        if self.settings.memory_limit_mib is not None and checkpoint is None:
            raise ConfigError("this model is in memory; use Engine.from_folder", setting="memory_limit_mib")
        limits = self.settings.limits
        self.limits = replace(limits, tokens=min(limits.tokens, positions_of(model.config)))
        weights = self.settings.dtype or str(model.dtype).removeprefix("torch.")
        if weights not in WEIGHTS:
            raise ConfigError(f"{weights} is not computed; choose of {', '.join(WEIGHTS)}", setting="dtype")
        dtype = "bfloat16" if weights == "int8" else weights
        kv_dtype = self.settings.kv_dtype or dtype
        self.kv_shape = kv_shape_of(model)
        pages = self.settings.kv_memory_mib * MIB // self.kv_shape.page_bytes(kv_dtype)
        device = model.device if checkpoint is None else None
        self.pools: dict[str, Tensor] = {kv_dtype: allocate(self.kv_shape, kv_dtype, max(pages, 1), device)}
        draft = self.settings.speculate
        self.speculator = Speculator(draft, within_page=kv_dtype != dtype) if draft else None
        # Pages are written in the step's own precision; where they are kept in another, they are rewritten once full.
        open_pages: PagePool | None = None
        if kv_dtype != dtype:
            open_pages = PagePool(2 * self.limits.slots + pages_of(self.limits.chunk), first_page(dtype))
            self.pools[dtype] = allocate(self.kv_shape, dtype, open_pages.pages, device)
        self.step, self.why_not_native = choose_step(
            model, weights, self.kv_shape, self.pools, self.settings, self.limits, checkpoint
        )
        rewriter = self.step if isinstance(self.step, NativeStep) else None
        self.table = PageTable(self.limits.slots, self.limits.tokens, open_pages, rewriter)
        self.tier = self._tier()
        pool = PagePool(max(pages, 1), first_page(kv_dtype))
        self.scheduler = Scheduler(self.limits, pool, self.speculator, self.tier, self._copy)
        self.logprobs: dict[Chain, list[float | None]] = {}
        # Called after each step, while its parts are as they entered.
        self.watchers: list[Callable[[Sequence[Part], Outputs], None]] = []
        self.evictor = self._evictor(kv_dtype)

    @property
    def longest(self) -> int:
        """Tokens that one chain can have, alone in the pool."""
        return min(self.limits.tokens, PAGE * self.scheduler.pool.pages)

    @classmethod
    def from_folder(cls, folder: Path, settings: EngineSettings | None = None) -> "Engine":
        """Serves the checkpoint in `folder`; with `memory_limit_mib` it may be larger than memory. The torch step runs
        on the accelerator where there is one.

        Raises CheckpointError for a folder that is none, and ConfigError for a limit below the least that works.
        """
        settings = settings or EngineSettings()
        if settings.memory_limit_mib is None:
            model: Any = load_model(folder, settings.load_dtype)
            found = torch.accelerator.current_accelerator(check_available=True)
            by_modules = settings.step in ("torch", "compiled")
            return cls(model.to(found) if found is not None and by_modules else model, settings)
        checkpoint = Checkpoint(folder)
        return cls(checkpoint.skeleton(settings.load_dtype), settings, checkpoint)

    @property
    def store(self) -> StoreFigures | None:
        """What the expert store has done; None where all experts are in memory."""
        store = self.step.store if isinstance(self.step, NativeStep) else None
        return None if store is None else store.figures()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give weights, threads and pages back."""
        self.step.close()
        if self.tier is not None:
            self.tier.close()
        self.pools.clear()

    def submit(self, request: Request) -> list[Chain]:
        """The request's chains, which `advance` brings on. Raises ConfigError for one that can never run."""
        thinking = request.thinking
        forced = () if thinking is None else (*thinking.closing, *thinking.end)
        for setting, tokens in (("prompt", request.prompt), ("end_of_thought", forced)):
            outside = [t for t in tokens if not 0 <= t < self.step.vocab]
            if outside:
                raise ConfigError(
                    f"token {outside[0]} is not in a vocabulary of {self.step.vocab}", setting=setting
                )
        chains = self.scheduler.add(request)
        self.logprobs.update((chain, [None] * chain.new_tokens) for chain in chains)
        return chains

    def cancel(self, chain: Chain) -> None:
        """End a chain; its pages are free at once."""
        self.scheduler.cancel(chain)

    def advance(self) -> list[Chain]:
        """One step. Returns the chains that got a token; a forced end of thought comes with the token before."""
        # Before the plan for chains that have ended, so that new ones find open pages; after it for preempted ones.
        self.table.release(self.scheduler.running)
        if self.tier is not None:
            self.tier.prefetch(islice(self.scheduler.waiting, PREFETCHED))
        parts = self.scheduler.plan()
        self.table.release(self.scheduler.running)
        if not parts:
            return []
        started = time.perf_counter()
        outputs = self.step.run(self._rows(parts))
        for watcher in self.watchers:
            watcher(parts, outputs)
        tokens = sample(outputs, parts, self.step)
        if self.speculator is not None:
            self.speculator.times.tell(sum(p.tokens for p in parts), 1e3 * (time.perf_counter() - started))
        got = [part for part in parts if part.last]
        chains = [part.chain for part in got]
        self._keep_logprobs(outputs, got, tokens)
        counts = {chain: len(mine) for chain, mine in zip(chains, tokens, strict=True)}
        self.table.close((part.chain, part.entered(counts.get(part.chain, 0))) for part in parts)
        self.scheduler.done(parts, tokens)
        for chain in chains:
            known, new = self.logprobs[chain], chain.new_tokens
            if len(known) != new:  # guesses that went on after a stop, or a forced end of thought
                del known[new:]
                known += [None] * (new - len(known))
        if self.evictor is not None:
            self.evictor.evict(chains)
        return chains

    def generate(
        self, requests: Sequence[Request], each: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """Run all requests to their ends. Completions come in the order of requests and samples; `each` is called
        as one is done."""
        numbered: dict[Chain, int] = {}
        done: dict[Chain, Completion] = {}
        try:
            for i, request in enumerate(requests):
                numbered |= dict.fromkeys(self.submit(request), i)
            while len(done) < len(numbered):
                # Chains that somebody cancelled meanwhile get no token: they are seen once nothing else runs.
                ended = numbered.keys() - done.keys() if self.scheduler.idle else self.advance()
                for chain in ended:
                    if chain.end is not None and chain in numbered:
                        done[chain] = self.completion(chain, numbered[chain])
                        if each is not None:
                            each(done[chain])
        finally:  # where a request is wrong, or `each` fails
            for chain in numbered.keys() - done.keys():
                self.forget(chain)
        return [done[chain] for chain in numbered]

    def forget(self, chain: Chain) -> None:
        """Cancel a chain of which no completion is wanted."""
        self.cancel(chain)
        self.logprobs.pop(chain, None)

    def completion(self, chain: Chain, number: int = 0) -> Completion:
        """What an ended chain has become; the engine then forgets it."""
        assert chain.end is not None
        new = chain.tokens[len(chain.request.prompt) :]
        return Completion(number, chain.sample, new, self.logprobs.pop(chain), chain.end)

    def check(self) -> None:
        """Assert that no page has leaked."""
        self.scheduler.check()
        self.table.check()

    def _keep_logprobs(self, outputs: Outputs, got: Iterable[Part], tokens: Iterable[list[int]]) -> None:
        rows, flat, known = [], [], []
        row = 0
        for (chain, _, _, draft), mine in zip(got, tokens, strict=True):
            rows += range(row, row + len(mine))
            flat += mine
            known += [self.logprobs[chain]] * len(mine)
            row += 1 + len(draft)
        # numpy is the quicker of both.
        logits_WV: Any = outputs.logits_WV.numpy() if outputs.logits_WV.is_cpu else outputs.logits_WV
        chosen = logits_WV[rows, flat].tolist()
        for mine, value, total in zip(known, chosen, outputs.log_total_W[rows].tolist(), strict=True):
            mine.append(value - total)

    def _copy(self, chain: Chain, other: Chain, place: int) -> bool:
        """The page of this place of one chain into another's; False where one is kept otherwise than it is written."""
        self.table.enter(other, 1)
        page, to = self.table.pages(chain)[place], self.table.pages(other)[place]
        kind, first = page >> FORMAT_SHIFT, (page >> FORMAT_SHIFT) << FORMAT_SHIFT
        if to >> FORMAT_SHIFT != kind:
            return False
        pool = self.pools[FORMATS[kind]]
        pool[to - first] = pool[page - first]
        return True

    def _tier(self) -> PageTier | None:
        if not self.settings.spill_mib:
            return None
        folder = self.settings.spill_folder
        return PageTier(
            self.table, self.pools, self.settings.spill_mib * MIB, None if folder is None else Path(folder)
        )

    def _evictor(self, kv_dtype: str) -> Evictor | None:
        above = self.settings.evict_above
        if above is None:
            return None
        if not isinstance(self.step, NativeStep):
            why = "" if self.why_not_native is None else f", which is not to be had: {self.why_not_native}"
            raise ConfigError(f"only the native step weighs pages{why}; leave it out", setting="evict_above")
        self.step.weighing = True
        evictor = Evictor(self.scheduler, above, self.kv_shape, kv_dtype, self.pools[kv_dtype])
        self.watchers.append(evictor.weigh)
        return evictor

    def _rows(self, parts: Iterable[Part]) -> Rows:
        tokens, positions, lengths, chains, want = [], [], [], [], []
        one_each = True
        for chain, count, last, draft in parts:
            slot, cached, length = chain.slot, chain.cached, chain.held + 1
            assert slot is not None
            self.table.enter(chain, count)
            if count == 1:
                tokens.append(chain.tokens[cached])
                positions.append(cached)
                lengths.append(length)
                chains.append(slot)
            else:
                one_each = False
                tokens += chain.tokens[cached : cached + count - len(draft)]
                tokens += draft
                positions += range(cached, cached + count)
                lengths += range(length, length + count)
                chains += [slot] * count
            if last:
                want += range(len(tokens) - 1 - len(draft), len(tokens))
        return Rows(
            _int32(tokens), _int32(positions), _int32(lengths), _int32(chains), self.table.lines_CP, _int32(want),
            one_each,
        )  # fmt: skip


def _int32(numbers: list[int]) -> Int32:
    return np.array(numbers, dtype=np.int32)
