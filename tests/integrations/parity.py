"""Parity: the same training in one process (the oracle) and spread over ranks, and how far they differ.

Every process trains for STEPS steps on micro-batches named by number; the oracle takes all of a step one
after the other and averages, a rank takes its own and the sharding averages. Nothing else differs: same
checkpoint, same text, same optimizer, same random draws (a router that samples draws from a seed set per
micro-batch).

An error is max|a - b| / max|b| over one tensor. AdamW divides by sqrt(v) + eps: an element's update changes
by up to lr / eps per change of its gradient, so with the default eps (1e-8) the rounding of a gradient that
is nearly zero becomes a whole step (measured: parameters 2e-4 apart). Both sides use eps 1e-5, a thousandth
of a typical gradient here, which leaves every update a normalised one and holds parameters to the same bound
as gradients.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from tests.integrations.toy_models import micro_batch, write_checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig, mixin
from transformers.distributed.utils import initialize_distributed_mesh

import anabranch
from anabranch.cli.device import device
from anabranch.integrations.transformers import adaptive_layers

STEPS = 3
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5, "foreach": False}


class Layout(NamedTuple):
    """How ranks share a model, and what is asked of the adaptive layer."""

    fsdp: int
    ep: int
    planner: str = "exact"
    transport: str = "all_to_all"
    chunks: int = 1
    per_node: int | None = None  # ranks that share a node; None: all
    tp: int = 1
    epsilon: float = 0.02
    slots: int = 2
    accumulate: int = 1
    reentrant: bool | None = None  # activation checkpointing; None: off
    dtype: str = "float32"
    experts_implementation: str = "grouped_mm"
    save_to: Path | None = None


class Outcome(NamedTuple):
    """What one process saw of a training.

    losses by (step, micro-batch); logits of the first step by micro-batch, `final` those of the trained model
    in evaluation; gradients of the first step and their norm. From the adaptive layers: calls of an experts
    module, plans made, guests in them.
    """

    losses: dict[tuple[int, int], float]
    logits: dict[int, Tensor]
    final: dict[int, Tensor]
    norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    calls: int = 0
    plans: int = 0
    guests: int = 0


class Errors(NamedTuple):
    """The worst of each kind. `where`: the tensor with the largest error of all."""

    loss: float
    logits: float
    norm: float
    gradients: float
    parameters: float
    where: str

    @property
    def worst(self) -> float:
        return max(self[:-1])


def train(model: PreTrainedModel, batches: list[int], *, collect: bool = True) -> Outcome:
    """STEPS AdamW steps on the mean loss of `batches`. Only a collecting process keeps whole tensors."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses: dict[tuple[int, int], float] = {}
    logits: dict[int, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    norm = 0.0
    for step in range(STEPS):
        for batch in batches:
            out = forward(model, step, batch)
            (out.loss / len(batches)).backward()
            losses[step, batch] = float(whole(out.loss))
            if step == 0:
                logits[batch] = whole(out.logits)
        if step == 0:
            norm = gradient_norm(model)
            gradients = gathered(
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, collect
            )
        optimizer.step()
        optimizer.zero_grad()
    parameters = gathered(dict(model.named_parameters()), collect)
    model.eval()
    with torch.no_grad():
        final = {batch: whole(forward(model, 0, batch).logits) for batch in batches}
    return Outcome(losses, logits, final, norm, gradients, parameters)


def forward(model: PreTrainedModel, step: int, batch: int) -> Any:
    torch.manual_seed(1000 * step + batch)
    ids = micro_batch(step, batch).to(model.device)
    return model(input_ids=ids, labels=ids, use_cache=False)


def gradient_norm(model: PreTrainedModel) -> float:
    """What transformers' Trainer clips by: one norm a mesh, hence collective on each."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in (p.grad for p in model.parameters() if p.grad is not None):
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [whole(get_total_norm(gradients)) for gradients in by_mesh.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if full.is_cuda else full.clone()


def gathered(tensors: dict[str, Tensor], collect: bool) -> dict[str, Tensor]:
    """Whole tensors on the collecting rank. Every rank calls it: gathering is collective."""
    full = {name: whole(tensor) for name, tensor in tensors.items()}
    return full if collect else {}


def oracle(folder: Path, batches: int, dtype: str = "float32") -> Outcome:
    """One process without expert parallelism, on the device that ranks have."""
    return train(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device()), list(range(batches)))


def on_rank(folder: Path, layout: Layout) -> Outcome:
    """The same training on one of the ranks of `layout`; rank 0 returns whole gradients and parameters."""
    model = load(folder, layout)
    plans, calls = [], []
    for layer in adaptive_layers(model).values():
        layer.observers.append(lambda seen: plans.append(seen.plan))
        layer.experts.register_forward_pre_hook(lambda module, args: calls.append(module))
    share = dist.get_rank() // layout.tp
    batches = [share + i * layout.fsdp for i in range(layout.accumulate)]
    outcome = train(model, batches, collect=dist.get_rank() == 0)
    if layout.save_to is not None:
        model.save_pretrained(layout.save_to)
    return outcome._replace(calls=len(calls), plans=len(plans), guests=sum(plan.guests for plan in plans))


def load(folder: Path, layout: Layout) -> PreTrainedModel:
    if layout.per_node is not None:
        os.environ["GROUP_RANK"] = str(dist.get_rank() // layout.per_node)
    cache = str(folder.parent / "cache")
    anabranch.enable(
        layout.planner, layout.epsilon, layout.slots, layout.transport, layout.chunks, cache=cache
    )
    config = DistributedConfig(
        fsdp_size=layout.fsdp, ep_size=layout.ep, tp_size=layout.tp, ep_implementation="anabranch"
    )
    with patch.object(mixin, "initialize_distributed_mesh", shared_mesh):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=layout.dtype,
            experts_implementation=layout.experts_implementation,
            distributed_config=config,
        )
    os.environ.pop("GROUP_RANK", None)
    if layout.reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": layout.reentrant})
    return model


meshes: dict[tuple[int, int, int], Any] = {}


def shared_mesh(config: DistributedConfig) -> Any:
    """Models of one layout share their meshes: process groups are never given back, and a rank holds few."""
    key = (config.fsdp_size, config.ep_size, config.tp_size)
    if key not in meshes:
        meshes[key] = initialize_distributed_mesh(config)
    return meshes[key]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|; infinite where b is all zeros and a is not."""
    difference = float((ours.double() - theirs.double()).abs().max())
    scale = float(theirs.double().abs().max())
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else float("inf")


def errors(ranks: list[Outcome], expected: Outcome, measure: Any = relative) -> Errors:
    """How far the ranks are from the oracle. Fails where either holds a tensor that the other has not."""
    first = ranks[0]
    logits = {f"logits {batch}": logits for rank in ranks for batch, logits in rank.logits.items()}
    final = {f"final logits {batch}": logits for rank in ranks for batch, logits in rank.final.items()}
    losses = {key: torch.tensor(loss) for rank in ranks for key, loss in rank.losses.items()}
    worst = partial(_worst, measure=measure)
    found = [
        worst(losses, {key: torch.tensor(loss) for key, loss in expected.losses.items()}),
        max(
            worst(logits, {f"logits {batch}": t for batch, t in expected.logits.items()}),
            worst(final, {f"final logits {batch}": t for batch, t in expected.final.items()}),
        ),
        worst({"norm": torch.tensor(first.norm)}, {"norm": torch.tensor(expected.norm)}),
        worst(first.gradients, expected.gradients),
        worst(first.parameters, expected.parameters),
    ]
    return Errors(*(error for error, _ in found), where=max(found)[1])


def _worst(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], *, measure: Any) -> tuple[float, str]:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max((measure(ours[name], theirs[name]), str(name)) for name in theirs)


class Judge:
    """Compares ranks with their oracle, made once for all cells that need it; keeps each family's errors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.oracles: dict[tuple[Any, ...], Outcome] = {}
        self.cells: dict[str, list[Errors]] = {}

    def checkpoint(self, family: str, experts: int = 8) -> Path:
        folder = self.folder / f"{family}-{experts}"
        if not folder.exists():
            write_checkpoint(family, experts, folder)
        return folder

    def oracle(self, family: str, batches: int, experts: int = 8, dtype: str = "float32") -> Outcome:
        key = (family, batches, experts, dtype)
        if key not in self.oracles:
            self.oracles[key] = oracle(self.checkpoint(family, experts), batches, dtype)
        return self.oracles[key]

    def errors(self, ranks: list[Outcome], family: str, batches: int, experts: int = 8) -> Errors:
        found = errors(ranks, self.oracle(family, batches, experts))
        self.cells.setdefault(family, []).append(found)
        return found
