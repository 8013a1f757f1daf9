"""What the recipes' trainings share: steps with checkpoints and a bar, and whose figures a report holds."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHECKPOINT_EVERY = 20


@contextmanager
def interruptible(out: Path, resume: bool) -> Iterator[None]:
    """A run in the folder `out`, new or empty unless resumed; Ctrl-C ends it with 130 and says what is left."""
    out.mkdir(parents=True, exist_ok=True)
    if not resume and any(out.iterdir()):
        raise typer.BadParameter(
            f"{out} is not empty; go on with --resume, or name another", param_hint="--out"
        )
    try:
        yield
    except KeyboardInterrupt:
        Console().print(f"Stopped. The last checkpoints are kept in {out}; --resume goes on from there.")
        raise typer.Exit(130) from None


def stage(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    lr: float,
    resume: bool,
    step: Callable[[int, torch.optim.Optimizer], dict[str, float]],
) -> list[dict[str, float]]:
    """Run step(number, optimizer) so often, with checkpoints; `folder` then holds the model, loadable by itself.

    Resumed, it goes on from its last checkpoint, to the same bits: a step depends on its number only. Raises
    BadParameter for a checkpoint of other steps or another rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    history: list[dict[str, float]] = []
    plan = {"steps": steps, "lr": lr}
    if resume and _found(folder):
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        if state["plan"] != plan:
            raise typer.BadParameter(f"{folder} is of {state['plan']}, not {plan}", param_hint="--resume")
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    with Progress() as progress:
        bar = progress.add_task(folder.name, total=steps, completed=len(history))
        for number in range(len(history), steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (number + 1) / 20) * (1 - 0.9 * number / steps)
            started, cpu = time.perf_counter(), time.process_time()
            told = step(number, optimizer)
            spent = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
            history.append({**told, **spent})
            name, value = next(iter(history[-1].items()))
            progress.update(bar, advance=1, description=f"{folder.name}: {name} {value:.3f}")
            if (number + 1) % CHECKPOINT_EVERY == 0 or number + 1 == steps:
                save(
                    folder,
                    model,
                    tokenizer,
                    {"plan": plan, "optimizer": optimizer.state_dict(), "history": history},
                )
    return history


def _found(folder: Path) -> bool:
    """Whether there is a checkpoint; one that an interruption left beside its place is put there."""
    for left in (folder.with_suffix(".new"), folder.with_suffix(".old")):
        if not folder.exists() and (left / "state.pt").exists():
            left.rename(folder)
    return (folder / "state.pt").exists()


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, state: dict[str, Any]
) -> None:
    """Beside the old checkpoint first: an interruption leaves one of the two whole."""
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    torch.save(state, new / "state.pt")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def descend(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on the gradients at hand, their norm at most 1."""
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def machine() -> dict[str, Any]:
    """Whose figures these are."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_1min": os.getloadavg()[0], "torch": torch.__version__,
    }  # fmt: skip
