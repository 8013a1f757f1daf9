"""Eviction while decoding: what the mind must know of attention and keys, and the pages it then lets go.

Shape suffixes: T rows of the step, P pages of a chain, L layers, G key-value heads, D head dimension.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from anabranch.scheduling import eviction
from anabranch.scheduling.chain import Chain
from anabranch.scheduling.pages import PAGE, pages_of
from anabranch.scheduling.scheduler import Part, Scheduler
from anabranch.serving.pools import FORMAT_SHIFT, KvShape, decode
from anabranch.serving.step.base import Outputs


class Evictor:
    """Keeps decoding chains of `scheduler` within `above` tokens. pool: their pages, kept as `kind`."""

    def __init__(self, scheduler: Scheduler, above: int, shape: KvShape, kind: str, pool: Tensor) -> None:
        eviction.require_budget(above)
        self._scheduler, self._above = scheduler, above
        self._shape, self._kind, self._pool = shape, kind, pool

    def weigh(self, parts: Sequence[Part], outputs: Outputs) -> None:
        """A watcher of the engine: tells the chains what their last rows before a draft looked at."""
        assert outputs.mass_TP is not None
        row = 0
        for chain, count, _, draft in parts:
            entered = count - len(draft)
            mass = outputs.mass_TP[row + entered - 1, : pages_of(chain.held + entered)]
            eviction.draw(chain, mass.tolist())
            row += count

    def evict(self, chains: Iterable[Chain]) -> None:
        """Pages leave those of the running chains that are over their budget."""
        for chain in chains:
            if chain.slot is not None and eviction.due(chain, self._above):
                places = eviction.leaving(chain, self._likeness(chain), self._above)
                self._scheduler.evict(chain, places)

    def _likeness(self, chain: Chain) -> list[float]:
        """Of each full page, the greatest similarity to a later one: the cosine of their mean keys, averaged over
        layers and heads."""
        indices = torch.tensor(chain.pages[: chain.held // PAGE]) & ((1 << FORMAT_SHIFT) - 1)
        keys_PLGDT, _ = decode(self._shape, self._kind, self._pool[indices])
        mean_PLGD = torch.nn.functional.normalize(keys_PLGDT.mean(-1), dim=-1)
        flat = mean_PLGD.flatten(1) / (self._shape.layers * self._shape.heads) ** 0.5
        later = (flat @ flat.T).triu(1).masked_fill(torch.ones(len(flat), len(flat)).tril().bool(), -1.0)
        return later.amax(1).tolist()
