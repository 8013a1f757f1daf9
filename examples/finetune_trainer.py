"""Finetune a local Mixture-of-Experts checkpoint with transformers' own Trainer, its experts balanced.

torchrun --nproc-per-node 2 examples/finetune_trainer.py CHECKPOINT TEXT_FILE OUT
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import anabranch
from anabranch.integrations.callback import AdaptiveCallback

WINDOW = 64


def windows(ids: list[int]) -> list[dict[str, list[int]]]:
    """A text's tokens as windows, without padding."""
    pieces = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(checkpoint: str, text_file: str, out: str) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    anabranch.enable(planner="bounded", epsilon=0.05, slots=2)  # the defaults
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="anabranch"),
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with open(text_file, encoding="utf-8") as file:
        data = windows(tokenizer(file.read()).input_ids)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=out,
            max_steps=20,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),  # else ranks on CPUs would all see the same data
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[AdaptiveCallback()],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
