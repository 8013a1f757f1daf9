"""The checkpoints of a run: which are complete, and which to go on from.

A checkpoint is a folder `checkpoint-STEP`. The mark in it is written last, after every rank has saved its
part, so a folder without one was left by a run that died while saving.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError

MARK = "complete.json"


def mark_complete(checkpoint: Path, step: int, identity: dict[str, Any]) -> None:
    """Call when all ranks have saved. identity: what a run must share with it to go on from it."""
    temporary = checkpoint / f".{MARK}.tmp"
    temporary.write_text(json.dumps({"step": step, "identity": identity}))
    os.replace(temporary, checkpoint / MARK)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"checkpoint-*/{MARK}")), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def latest_checkpoint(folder: Path, identity: dict[str, Any]) -> Path:
    """The newest complete checkpoint. Raises CheckpointError where there is none, or it is of another run."""
    found = complete_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint; start the run again with --overwrite", setting="resume"
        )
    try:
        held = dict(json.loads((found[-1] / MARK).read_text())["identity"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{found[-1] / MARK} is damaged; remove {found[-1]} to go on from the one before",
            setting="resume",
        ) from error
    if changed := difference(held, identity):
        raise CheckpointError(
            f"{found[-1]} is of another run: {changed}; resume with the settings and data it was made with, "
            "or start anew with --overwrite",
            setting="resume",
        )
    return found[-1]


def keep_newest(folder: Path, count: int) -> None:
    """Remove all complete checkpoints but the newest `count`."""
    for checkpoint in complete_checkpoints(folder)[:-count]:
        _remove(checkpoint)


def discard_after(checkpoint: Path) -> None:
    """Remove what a run that goes on from `checkpoint` will write again: later and unfinished ones."""
    for other in checkpoint.parent.glob("checkpoint-*"):
        if step_of(other) > step_of(checkpoint) or not (other / MARK).exists():
            _remove(other)


def _remove(checkpoint: Path) -> None:
    """The mark first: a removal that is interrupted leaves no complete checkpoint behind."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def difference(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What changed, in words; empty where nothing did."""
    names = [*wanted, *(name for name in held if name not in wanted)]
    return ", ".join(
        f"{name} was {held.get(name)!r}, now {wanted.get(name)!r}"
        for name in names
        if held.get(name) != wanted.get(name)
    )
