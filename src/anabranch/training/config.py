"""What a training run is made of."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError
from anabranch.integrations.transformers import AdaptiveSettings


@dataclass(frozen=True)
class RunConfig:
    """One training run. `check` raises ConfigError naming the first setting that cannot work.

    model: a preset ("tiny", "small"), a folder with a configuration (trained from scratch) or with weights
        (continued), or a configuration file.
    data: "stdlib", or files and folders of text (.txt, .jsonl, .parquet).
    out: where everything the run writes goes.
    ranks: processes. ep_size: how many of them share one set of experts; None for all.
    experts: how the experts are balanced.
    batch_size: sequences a rank computes at once. sequence_length: tokens each; None for the preset's.
    dtype: "float32", or "bfloat16" (bf16 computation over fp32 parameters).
    save_every, eval_every: steps between checkpoints and evaluations; 0 for only at the end.
    max_bytes: the most text read. cache: where tokenizers and token streams are kept.
    timeout_s: how long a rank waits for the others before it gives up.
    trace_every: record the natural routing of every so many steps to `out`/routing.npz; 0 for never.
    trace_ids: record each token's experts too.
    """

    model: str = "tiny"
    data: tuple[str, ...] = ("stdlib",)
    out: str = "runs/train"
    ranks: int = 2
    ep_size: int | None = None
    experts: AdaptiveSettings = field(default_factory=AdaptiveSettings)
    steps: int = 200
    batch_size: int = 8
    sequence_length: int | None = None
    learning_rate: float = 2e-3
    dtype: str = "float32"
    seed: int = 0
    save_every: int = 100
    eval_every: int = 50
    max_bytes: int = 24_000_000
    cache: str = "~/.cache/anabranch"
    timeout_s: int = 600
    trace_every: int = 0
    trace_ids: bool = False
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Everything that can be wrong before a process starts or a file is written."""
        for name in ("ranks", "steps", "batch_size", "timeout_s", "max_bytes"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_every", "eval_every", "trace_every", "seed"):
            _at_least(name, getattr(self, name), 0)
        if not 0 < self.learning_rate < 10:
            raise ConfigError(f"{self.learning_rate} is not a learning rate between 0 and 10", setting="learning_rate")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"{self.dtype!r} is not float32 or bfloat16", setting="dtype")
        if self.ep_size is not None and (self.ep_size < 1 or self.ranks % self.ep_size):
            raise ConfigError(
                f"{self.ep_size} does not divide ranks={self.ranks}; use a divisor of it", setting="ep_size"
            )
        self._check_out()

    def _check_out(self) -> None:
        held = (self.out_path / "config.json").exists()
        if self.resume and self.overwrite:
            raise ConfigError("either resume or overwrite, not both", setting="resume")
        if self.resume and not held:
            raise ConfigError(f"{self.out} holds no run to resume", setting="out")
        if held and not (self.resume or self.overwrite):
            raise ConfigError(
                f"{self.out} already holds a run; go on with --resume, or replace it with --overwrite", setting="out"
            )
        if not held and self.out_path.is_dir() and any(self.out_path.iterdir()):
            raise ConfigError(f"{self.out} holds files that are not of a run; name an empty folder", setting="out")
        if self.out_path.exists() and not self.out_path.is_dir():
            raise ConfigError(f"{self.out} is a file; name a folder", setting="out")

    @property
    def out_path(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def group_size(self) -> int:
        """Ranks that share one set of experts."""
        return self.ep_size if self.ep_size is not None else self.ranks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        return cls(**{**values, "experts": AdaptiveSettings(**values["experts"]), "data": tuple(values["data"])})

    def identity(self) -> str:
        """What must be equal for a run to be resumed: everything that shapes the model, the data and the updates."""
        kept = ("model", "data", "ep_size", "steps", "batch_size", "sequence_length", "learning_rate", "dtype", "seed")
        return json.dumps({name: self.to_dict()[name] for name in (*kept, "ranks", "max_bytes")}, sort_keys=True)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{value} is below {low}", setting=name)
