"""Engines of several ranks whose experts are spread over them: each has its own chains, all step together.

Attention is data-parallel: a rank's chains, pages and scheduler are its own. Only the layers' collectives join the
ranks, and those every rank must enter equally often: hence the lockstep.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.errors import ConfigError, RankError
from anabranch.scheduling.chain import Chain, Request
from anabranch.serving.engine import Completion, Engine
from anabranch.serving.step.base import Outputs, Rows
from anabranch.serving.step.draw import Draw
from anabranch.serving.step.torch_step import TorchStep


class Agreed(NamedTuple):
    """Sums over all ranks: samples or requests that have not ended, and new tokens."""

    left: int
    new_tokens: int


class ParallelEngine:
    """Brings the engines of all ranks on together. Every method is collective: all ranks call it alike.

    One round: 1. the ranks tell each other whether they have work left and whether all is well; 2. each runs one
    step, a rank with nothing to compute with one row that nobody reads, since the modules of transformers take no
    empty batch; 3. each samples for its own chains. All stop once all are idle.

    A rank that fails outside the model (a wrong request, a failing `each`) says so in the next round, and all raise.
    One that fails inside the model has left its peers in a collective of a layer: it raises, and they wait until
    its process ends or their group's timeout is over.

    Which exchange the layers use is the adaptive layer's: `enable(transport=..., dispatch_wire="int8")`.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises ConfigError where the engine runs another step than the model's own modules."""
        if type(engine.step) is not TorchStep:  # a compiled one has no room for collectives
            raise ConfigError("experts on several ranks are computed by step='torch'", setting="step")
        self.engine, self.device = engine, engine.step.model.device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        engine.step = self._step = _WatchedStep(engine.step)
        self._told = False

    def generate(
        self, requests: Sequence[Request], each: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """Run this rank's requests, which may be none, to their ends, as `Engine.generate` does."""
        with self.together():
            numbered = {c: i for i, request in enumerate(requests) for c in self.engine.submit(request)}
            done: dict[Chain, Completion] = {}
            while self.agree(len(numbered) - len(done)).left:
                for chain in self.advance():
                    if chain.end is not None and chain in numbered:
                        done[chain] = self.engine.completion(chain, numbered[chain])
                        if each is not None:
                            each(done[chain])
        return [done[chain] for chain in numbered]

    def deal(self, requests: Sequence[Request]) -> list[Completion]:
        """Run rank 0's requests on all ranks, request i on rank i modulo their number; the others' are not read.

        Rank 0 returns all completions in order, the others none.
        """
        dealt = [list(requests)]
        dist.broadcast_object_list(dealt, src=0, device=self.device)
        mine = self.generate(dealt[0][self.rank :: self.ranks])
        mine = [c._replace(request=self.rank + self.ranks * c.request) for c in mine]
        all_ranks: list[list[Completion]] = [[] for _ in range(self.ranks)]
        dist.all_gather_object(all_ranks, mine)
        if self.rank:
            return []
        return sorted((c for part in all_ranks for c in part), key=lambda c: (c.request, c.sample))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around rounds of `agree` and `advance`: what ends this rank's part early, the others hear of in the next."""
        self._told = fine = False
        try:
            yield
            fine = True
        finally:
            if not fine:
                for chain in [*self.engine.scheduler.waiting, *self.engine.scheduler.running]:
                    self.engine.forget(chain)
                if not self._told and not self._step.inside:
                    self._sum(1, 0, 0)

    def agree(self, left: int, new_tokens: int = 0) -> Agreed:
        """What all ranks have left, and have generated, together. Raises RankError where another one failed."""
        failed, *sums = self._sum(0, left, new_tokens)
        if failed:
            self._told = True
            raise RankError("another rank failed; its own error says why", setting="generate")
        return Agreed(*sums)

    def advance(self) -> list[Chain]:
        """One step of every rank; as `Engine.advance` for this one's chains."""
        before = self._step.runs
        got = self.engine.advance()
        if self._step.runs == before:
            self._take_part()
        return got

    def _take_part(self) -> None:
        """A step of one row, whose key and value go to a page that nobody holds."""
        scheduler = self.engine.scheduler
        if scheduler.pool.free == 0:
            scheduler.prefixes.forget(1)
        page, zero = scheduler.pool.take(), np.zeros(1, dtype=np.int32)
        one, none = zero + 1, zero[:0]
        self._step.run(Rows(zero, zero, one, zero, np.array([[page]], dtype=np.int32), none, True))
        scheduler.pool.give_back(page)

    def _sum(self, *numbers: int) -> list[int]:
        sums = torch.tensor(numbers, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()


class _WatchedStep:
    """A step that counts its runs and knows whether one was left by an error."""

    def __init__(self, step: TorchStep) -> None:
        self.step, self.name, self.vocab, self.routing = step, step.name, step.vocab, step.routing
        self.runs, self.inside = 0, False

    def run(self, rows: Rows) -> Outputs:
        self.step.routing = self.routing
        self.inside = True
        outputs = self.step.run(rows)
        self.inside = False
        self.runs += 1
        return outputs

    def draw(self, logits_WV: Tensor, draws: Sequence[Draw]) -> list[int]:
        return self.step.draw(logits_WV, draws)

    def close(self) -> None:
        self.step.close()
