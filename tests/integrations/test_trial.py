"""`auto` tries calls inside a training step, on real ranks, and nothing of the step changes.

Expert e multiplies a row, element by element, by its one parameter of D numbers.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anabranch.experts.adaptive import AdaptiveExperts
from anabranch.integrations.trial import LayerTrial
from anabranch.placement.base import Homes
from anabranch.placement.cheapest import CheapestChoice
from anabranch.placement.choice import Exchange, FixedChoice
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.static import StaticPlanner
from anabranch.transport import Wires, make_domain, make_transport
from run_distributed import RankPool

EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 2, 16, 48
EXCHANGES = (Exchange("all_to_all"), Exchange("dedup"), Exchange("dedup", 2))


class Alike:
    """Prices that tell nothing apart: trials have to."""

    def call_ms(self, plan: Any, exchange: Exchange, planner: str) -> float:
        return 1.0

    def guest_rows(self, *, across_nodes: bool) -> int:
        return 0


def multiply(weights: Any, rows_ND: Tensor, ends_J: Tensor, slot_N: Tensor) -> Tensor:
    return rows_ND * weights[0][slot_N]


def step(wire: str, checkpointed: bool) -> tuple[list[Any], list[bool]]:
    """What was tried, and whether outputs and gradients are those of the kept choice without trials."""
    assert dist.group.WORLD is not None
    rank, domain = dist.get_rank(), make_domain(dist.group.WORLD, torch.device("cpu"))
    homes = Homes.contiguous(EXPERTS, domain.ranks)
    transports = {name: make_transport(name, domain, Wires(wire, wire)) for name in ("all_to_all", "dedup")}
    chooser = CheapestChoice({p.name: p for p in (StaticPlanner(), ExactPlanner())}, EXCHANGES, Alike())
    layer = AdaptiveExperts(dist.group.WORLD, homes, chooser, transports, multiply)
    layer.trial_of = LayerTrial
    draw = torch.Generator().manual_seed(rank)
    home = [torch.rand(homes.slots, HIDDEN, generator=draw).requires_grad_()]
    x_SD = torch.rand(TOKENS, HIDDEN, generator=draw).requires_grad_()
    # Experts of the first rank are hot.
    odds_E = torch.arange(EXPERTS, 0, -1.0).square()
    ids_SK = torch.multinomial(odds_E.expand(TOKENS, -1), TOP_K, generator=draw)
    weights_SK = torch.rand(TOKENS, TOP_K, generator=draw).requires_grad_()
    torch.manual_seed(7)
    if checkpointed:
        y_SD = checkpoint(layer, home, x_SD, ids_SK, weights_SK, use_reentrant=False)
    else:
        y_SD = layer(home, x_SD, ids_SK, weights_SK)
    y_SD.square().sum().backward()
    grads = [p.grad for p in (x_SD, weights_SK, *home)]
    state = chooser.state()
    planner, transport, chunks = state["kept"]
    fixed = FixedChoice(chooser.planners[planner], Exchange(transport, chunks))
    plain = AdaptiveExperts(dist.group.WORLD, homes, fixed, transports, multiply)
    torch.manual_seed(7)
    twin = [t.detach().requires_grad_() for t in (x_SD, weights_SK, *home)]
    z_SD = plain(twin[2:], twin[0], ids_SK, twin[1])
    z_SD.square().sum().backward()
    same = [torch.equal(y_SD, z_SD), *(torch.equal(a, b.grad) for a, b in zip(grads, twin, strict=True))]
    return state["tried"], same


def test_trials_leave_the_step_as_it_is_and_ranks_agree(ranks2: RankPool) -> None:
    for wire, checkpointed in (("none", False), ("none", True), ("int8_stochastic", False)):
        (tried, same), (other_tried, other_same) = ranks2.run(step, wire, checkpointed)
        assert all(same)
        assert all(other_same)
        assert tried == other_tried
        assert {(planner, transport, chunks) for _, planner, transport, chunks, *_ in tried} >= {
            ("static", "all_to_all", 1),
            ("exact", "all_to_all", 1),
            ("static", "dedup", 1),
        }
