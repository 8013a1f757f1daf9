"""`transformers.Trainer`, where it holds; this file is where it does not (transformers 5.23).

Clipping across meshes holds. Resuming does not: the Trainer refuses to checkpoint the optimizer of a model
sharded at load time, though transformers has the functions that write and read it.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from anabranch.integrations.transformers import AdaptiveEP, adaptive_layers
from anabranch.training.checkpoints import keep_newest, mark_complete

OPTIMIZER_FOLDER = "optimizer_distributed"
KEPT = 2


class AdaptiveTrainer(Trainer):
    """Checkpoints whole sharded models: every rank's optimizer state, and a mark that the folder is complete.

    identity: what a run must share with a checkpoint to continue it; written into the mark. The newest `KEPT`
    checkpoints stay; older ones go once the new one is complete.
    """

    def __init__(self, *, args: TrainingArguments, identity: dict[str, Any], **kwargs: Any) -> None:
        # The refusal reads this argument once, on construction; `_save_checkpoint` reads it at every save.
        args.save_only_model = True
        super().__init__(args=args, **kwargs)
        args.save_only_model = False
        self.identity = identity

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """In order: `PackedDataset` is already shuffled by the run's seed, so a position is a number."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer_distributed(self.model, self.optimizer, str(Path(output_dir) / OPTIMIZER_FOLDER))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_distributed(self.model, self.optimizer, str(Path(checkpoint) / OPTIMIZER_FOLDER))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The runner built the model from this checkpoint's weights; left are the choices of `auto`."""
        file = Path(resume_from_checkpoint) / self._choices
        states = json.loads(file.read_text()) if file.exists() else {}
        for name, layer in self._layers.items():
            if name in states:
                layer.restore(states[name])

    @property
    def _layers(self) -> dict[str, AdaptiveEP]:
        model: Any = self.model
        return adaptive_layers(model)

    @property
    def _choices(self) -> str:
        return f"choices-{self.args.process_index:04d}.json"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        states = {name: state for name, layer in self._layers.items() if (state := layer.state())}
        if states:
            saved = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (saved / self._choices).write_text(json.dumps(states))
        if dist.is_initialized():
            dist.barrier()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            step = self.state.global_step
            mark_complete(folder / f"checkpoint-{step}", step, self.identity)
            keep_newest(folder, KEPT)
