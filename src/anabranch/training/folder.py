"""The folder of a run: what is in it, and whether a run may start or go on there."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError, ConfigError
from anabranch.training.checkpoints import complete_checkpoints, difference


@dataclass(frozen=True)
class RunFolder:
    """Everything one run writes:

    run.json        its settings; a folder that has one holds a run
    metrics.jsonl   one line a step
    tensorboard/    the same as events
    checkpoints/    checkpoint-STEP/, each with a mark when complete
    model/          the trained model and tokenizer, for plain transformers
    routing.npz     the routing, where it was recorded
    summary.json    what the run came to
    comparison.json that of several runs, where they were compared
    """

    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def trace(self) -> Path:
        return self.path / "routing.npz"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.json"

    @property
    def scratch(self) -> Path:
        """Where a run keeps its initial weights while it loads them: outside the folder, on its disk."""
        return existing_parent(self.path) / f".{self.path.name}.starting"

    def check(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raise ConfigError unless a run may write here, CheckpointError where it cannot be resumed."""
        if resume and overwrite:
            raise ConfigError("resume and overwrite contradict each other; give one", setting="resume")
        require_folder("out", self.path)
        held = self.run_file.is_file()
        if resume and not held:
            raise ConfigError(f"{self.path} holds no run; start one without --resume", setting="out")
        if resume:
            self._check_identity(identity)
        elif held and not overwrite:
            raise ConfigError(
                f"{self.path} already holds a run; replace it with --overwrite, or let `anabranch train` "
                "go on with --resume",
                setting="out",
            )
        elif not held and self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"{self.path} holds files that are not of a run; name a new or empty folder", setting="out"
            )

    def _check_identity(self, identity: dict[str, Any]) -> None:
        held = _read(self.run_file)
        if changed := difference({name: held.get(name) for name in identity}, identity):
            raise CheckpointError(
                f"{self.path} is of another run: {changed}; resume with the settings it was started with, or "
                "replace it with --overwrite",
                setting="resume",
            )

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is through; None for one that is not."""
        if not (self.run_file.is_file() and self.summary.is_file()):
            return None
        summary = _read(self.summary)
        return None if summary.get("stopped_early", True) else summary

    @property
    def resumable(self) -> bool:
        """Whether a run here is through, or has a checkpoint to go on from."""
        return self.run_file.is_file() and bool(self.finished() or complete_checkpoints(self.checkpoints))

    def claim(self, settings: dict[str, Any]) -> None:
        """Begin a new run here: what an earlier one left is removed, nothing else."""
        for file in (self.run_file, self.metrics, self.trace, self.summary, self.comparison):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.checkpoints, self.model):
            if folder.is_dir():
                shutil.rmtree(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run_file, settings)


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def require_folder(setting: str, path: Path) -> None:
    """Raise ConfigError unless `path` is a folder that can be written, or can be made one."""
    nearest = path if path.exists() else existing_parent(path)
    if not nearest.is_dir():
        raise ConfigError(f"{nearest} is a file; name a folder", setting=setting)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{nearest} cannot be written; name another folder", setting=setting)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False))
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); start the run again with --overwrite", setting="resume"
        ) from error
