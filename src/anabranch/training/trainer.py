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

from anabranch.errors import CheckpointError

OPTIMIZER_FOLDER = "optimizer_distributed"
COMPLETE = "complete.json"


class AdaptiveTrainer(Trainer):
    """Checkpoints whole sharded models: every rank's optimizer state, and a mark that the folder is complete.

    identity: what a run must share with a checkpoint to continue it; written into the mark.
    """

    def __init__(self, *, args: TrainingArguments, identity: str, **kwargs: Any) -> None:
        # The refusal reads this argument once, on construction; `_save_checkpoint` reads it at every save.
        args.save_only_model = True
        super().__init__(args=args, **kwargs)
        args.save_only_model = False
        self.identity = identity

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """In order: `PackedDataset` is already shuffled by the run's seed, so a position is a number."""
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer_distributed(self.model, self.optimizer, str(Path(output_dir) / OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_distributed(self.model, self.optimizer, str(Path(checkpoint) / OPTIMIZER_FOLDER))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing to do: the runner built the model from this checkpoint's weights."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if dist.is_initialized():
            dist.barrier()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            mark = {"identity": self.identity, "step": self.state.global_step}
            (folder / COMPLETE).write_text(json.dumps(mark))


def latest_checkpoint(folder: Path, identity: str) -> Path:
    """The newest complete checkpoint. Raises CheckpointError where there is none, or it is of another run."""
    found = sorted(folder.glob(f"checkpoint-*/{COMPLETE}"), key=lambda p: json.loads(p.read_text())["step"])
    if not found:
        raise CheckpointError(f"{folder} holds no complete checkpoint to resume from", setting="resume")
    held = json.loads(found[-1].read_text())["identity"]
    if held != identity:
        raise CheckpointError(
            f"{found[-1].parent} is of another run: {_difference(held, identity)}; "
            "resume with the settings it was made with, or start anew with overwrite",
            setting="resume",
        )
    return found[-1].parent


def _difference(held: str, wanted: str) -> str:
    old, new = json.loads(held), json.loads(wanted)
    return ", ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in new if old.get(k) != new.get(k))
