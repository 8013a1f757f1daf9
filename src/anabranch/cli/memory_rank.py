"""The trainings of `anabranch bench memory`, and what a rank measures of one: tensors that are alive at its peak."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import anabranch
from anabranch.experts.adaptive import Observation
from anabranch.integrations.transformers import AdaptiveEP, adaptive_layers
from anabranch.training.agreement import gathered, is_first, join, on_all_ranks
from anabranch.training.config import RunConfig
from anabranch.training.data import PackedDataset, build_data
from anabranch.training.residents import Residents, resident_bytes
from anabranch.training.runner import arguments, from_folder
from anabranch.training.trainer import AdaptiveTrainer

STEPS, TIMEOUT_S = 3, 120  # the first step makes the optimizer's state and is not measured
TEXT_BYTES = 400_000
DENSE = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
MOE = {"moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}


@dataclass(frozen=True)
class MemoryRun:
    """One training. ep: ranks that share one set of experts. sizes: of the config where they are not the usual."""

    name: str
    model: str = "qwen3_moe"
    ranks: int = 1
    ep: int = 1
    dtype: str = "float32"
    recompute: bool = False
    micro_batches: int = 1
    batch: int = 4
    seq: int = 256
    vocab: int = 640
    planner: str = "static"
    transport: str = "all_to_all"
    sizes: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> PreTrainedConfig:
        sizes = DENSE | (MOE if "moe" in self.model else {}) | {"vocab_size": self.vocab} | dict(self.sizes)
        return AutoConfig.for_model(self.model, **sizes)

    def text(self, cache: Path) -> PackedDataset:
        return build_data(["stdlib"], vocab_size=self.vocab, sequence_length=self.seq, seed=0, cache_dir=cache,
                          max_bytes=TEXT_BYTES).train  # fmt: skip


class Measured(NamedTuple):
    """Of one rank, in bytes. peak: of all tensors; logits: of those of the logits' sizes at the peak. rows: that it
    computed over its own tokens' rows, of the fullest micro-batch; guests: that it held a layer in it."""

    peak: int
    logits: int
    weights: int
    gradients: int
    optimizer: int
    rows: float
    guests: float


class Watch(TrainerCallback):
    """Sees the state of every step, and from the second step on the peak and each layer's rows and guests."""

    def __init__(self, residents: Residents, layers: Sequence[AdaptiveEP]) -> None:
        self.residents, self.layers = residents, len(layers)
        self.rank = dist.get_rank(layers[0].group) if layers else 0
        self.calls = list[tuple[float, float]]()
        self.gradients = self.optimizer = 0
        for layer in layers:
            layer.observers.append(self.observe)

    def observe(self, seen: Observation) -> None:
        quota_E = seen.plan.quota_RE[self.rank]
        guests = (quota_E > 0) & (seen.plan.homes.rank_E != self.rank)
        self.calls.append((float(quota_E.sum()) / seen.ids_SK.numel(), float(guests.sum())))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.calls.clear()
            self.residents.restart()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = resident_bytes(p.grad for p in kwargs["model"].parameters() if p.grad is not None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        states = kwargs["optimizer"].state.values()
        self.optimizer = resident_bytes(
            t for state in states for t in state.values() if isinstance(t, Tensor)
        )

    def fullest(self, layers: int) -> tuple[float, float]:
        """Means over so many layers in turn, of those with most rows."""
        parts = [self.calls[i : i + layers] for i in range(0, len(self.calls), layers)]
        means = [
            (sum(rows) / layers, sum(guests) / layers)
            for rows, guests in (zip(*p, strict=True) for p in parts)
        ]
        return max(means, default=(1.0, 0.0))


def memory_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank: every run in turn. Rank 0 returns the fullest rank's peak, and the largest states."""
    join(TIMEOUT_S)
    found = list[dict[str, Any]]()
    for run in settings["runs"]:
        ranks = gathered(_train(MemoryRun(**run), Path(settings["folder"])))
        largest = {name: max(getattr(rank, name) for rank in ranks) for name in Measured._fields[2:5]}
        found.append(max(ranks)._replace(**largest)._asdict())
    return {"measured": found}


def _train(run: MemoryRun, folder: Path) -> Measured:
    """As `anabranch train` does, on the standard library's text, with all tensors in sight."""
    weights = folder / run.name / "weights"
    anabranch.enable(planner=run.planner, transport=run.transport, cache=str(folder))
    config = RunConfig(
        ranks=run.ranks, ep_size=run.ep, steps=STEPS, batch_size=run.batch, sequence_length=run.seq, dtype=run.dtype,
        out=str(folder / run.name), save_every=0, eval_every=0,
    )  # fmt: skip
    torch.manual_seed(0)
    new = AutoModelForCausalLM.from_config(run.config, dtype=torch.float32)
    on_all_ranks(lambda: new.save_pretrained(weights) if is_first() else None)
    model, told, residents = from_folder(config, weights, "model"), arguments(config), Residents()
    told.gradient_accumulation_steps, told.activation_checkpointing = run.micro_batches, run.recompute
    watch = Watch(residents, list(adaptive_layers(model).values()))
    residents.watch([*model.parameters(), *model.buffers()])
    trainer = AdaptiveTrainer(
        model=model, args=told, train_dataset=run.text(folder), callbacks=[watch], identity={}
    )
    trainer.remove_callback(PrinterCallback)
    with residents:
        trainer.train()
    logits = sum(
        size for sizes, size in residents.at_peak.items() if len(sizes) > 1 and sizes[-1] == run.vocab
    )
    # Activations of all layers are there together, unless they are recomputed: then the fullest layer counts.
    rows, guests = watch.fullest(1 if run.recompute else max(1, watch.layers))
    return Measured(residents.peak, logits, resident_bytes(model.parameters()), watch.gradients, watch.optimizer, rows,
                    guests)  # fmt: skip
