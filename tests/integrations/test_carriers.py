"""What `auto` measures on real ranks: complete, equal on all of them, and measured once."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from anabranch.costs.prices import CalibratedPrices
from anabranch.integrations.carriers import Carriers
from anabranch.integrations.measure import LayerShape
from anabranch.placement.base import Homes
from anabranch.placement.cheapest import candidate_planners
from anabranch.placement.prices import Prices
from anabranch.telemetry.samples import Samples
from anabranch.transport import Wires, make_domain
from anabranch.transport.choose import candidate_exchanges
from run_distributed import RankPool

EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 2, 16, 64


class Memory:
    """A calibration that counts. A rank other than the first must never be asked."""

    def __init__(self) -> None:
        self.kept: dict[str, Samples] = {}
        self.loads = 0

    def load(self, key: str) -> Samples | None:
        self.loads += 1
        return self.kept.get(key)

    def store(self, key: str, samples: Samples) -> None:
        self.kept[key] = samples

    def prices(self, samples: Samples) -> Prices:
        return CalibratedPrices(samples)


def multiply(weights: Any, rows_ND: torch.Tensor, ends_J: torch.Tensor, slot_N: torch.Tensor) -> torch.Tensor:
    return rows_ND * weights[0][slot_N]


def measure(tokens: int, wire: str) -> tuple[dict[str, Any], int, int, int]:
    assert dist.group.WORLD is not None
    domain = make_domain(dist.group.WORLD, torch.device("cpu"))
    homes = Homes.contiguous(EXPERTS, domain.ranks)
    home = [torch.ones(homes.slots, HIDDEN)]
    memory = Memory()
    shape = LayerShape(homes, tokens - dist.get_rank(), HIDDEN, TOP_K, torch.float32)
    for _ in range(2):  # another layer of the same shape, then another run
        carriers = Carriers(domain, candidate_exchanges(domain.nodes), Wires(wire, "none"))
        for _ in range(2):
            with torch.no_grad():  # a first pass may be an evaluation
                prices = carriers.prices(memory, shape, home, multiply)
    assert isinstance(prices, CalibratedPrices)
    planners = candidate_planners(prices, domain.nodes, epsilon=0.05, slots=2)
    counts = torch.full((domain.ranks, EXPERTS), 16).numpy()
    for name, planner in planners.items():
        for exchange in carriers.exchanges:
            assert prices.call_ms(planner.plan(counts, homes), exchange, name) > 0
    return prices.model.samples.to_json(), memory.loads, len(memory.kept), len(home[0].shape)


@pytest.mark.parametrize("wire", ["none", "int8"])
def test_ranks_share_one_measurement(wire: str, ranks2: RankPool) -> None:
    (first, loads, kept, _), (second, other_loads, other_kept, _) = ranks2.run(measure, TOKENS, wire)
    assert first == second
    assert (loads, kept) == (2, 1), "asked once a run, measured once in all"
    assert (other_loads, other_kept) == (0, 0)
    samples = Samples.from_json(first)
    assert samples.dispatch_row_bytes == (4 * HIDDEN if wire == "none" else HIDDEN + 4)
    assert samples.combine_row_bytes == 4 * HIDDEN
    assert samples.node_R == (0, 0)
    assert set(samples.link_ms) == {"intra"}
    measured = {(call.transport, call.chunks) for call in samples.call_ms}
    assert measured == {("all_to_all", 1), ("dedup", 1), ("dedup", 2)}
    assert {call.tokens for call in samples.call_ms} == {TOKENS // 4, TOKENS}


def test_a_tiny_micro_batch_is_measured_too(ranks2: RankPool) -> None:
    (first, *_), _ = ranks2.run(measure, 4, "none")
    assert len(Samples.from_json(first).link_ms["intra"]) == 2
