"""What a training run is made of."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.telemetry.energy import check_meter
from anabranch.training.folder import RunFolder, require_folder

DTYPES = ("float32", "bfloat16")
# The largest seed that numpy takes; as seconds, more than any run's.
MOST = 2**32 - 1


@dataclass(frozen=True)
class RunConfig:
    """One training run. `check` raises ConfigError naming the first setting that cannot work."""

    # A preset ("tiny", "small"), a folder with a configuration (trained from scratch) or with weights
    # (continued), or a configuration file.
    model: str = "tiny"
    # "stdlib", or files and folders of text (.txt, .jsonl, .parquet).
    data: tuple[str, ...] = ("stdlib",)
    # Where everything the run writes goes.
    out: str = "runs/train"
    # Processes.
    ranks: int = 2
    # How many of the ranks share one set of experts; None for all.
    ep_size: int | None = None
    # How the experts are balanced.
    experts: AdaptiveSettings = field(default_factory=AdaptiveSettings)
    # Optimizer steps.
    steps: int = 200
    # Sequences a rank computes at once.
    batch_size: int = 8
    # Tokens a sequence; None for the model's own choice.
    sequence_length: int | None = None
    # The peak of the cosine schedule, after warm-up.
    learning_rate: float = 2e-3
    # "float32", or "bfloat16" (bf16 computation over fp32 parameters).
    dtype: str = "float32"
    # Of weights and data order.
    seed: int = 0
    # Steps between checkpoints, the last step included; 0 for none but when interrupted.
    save_every: int = 100
    # Steps between evaluations; there is always one at the end, and 0 is for that only.
    eval_every: int = 50
    # The most text read.
    max_bytes: int = 24_000_000
    # Folder for tokenizers and token streams.
    cache: str = "~/.cache/anabranch"
    # How long a rank waits for the others before it gives up.
    timeout_s: int = 600
    # Record the natural routing of every so many steps; 0 for never.
    trace_every: int = 0
    # Record each token's experts too.
    trace_ids: bool = False
    # Of energy: "auto" (RAPL where it may be read, else CPU seconds), "rapl", "zeus", "neuron:WATTS", ...
    meter: str = "auto"
    # Go on from the last complete checkpoint in `out`.
    resume: bool = False
    # Replace the run in `out`.
    overwrite: bool = False

    def check(self) -> None:
        """Everything that can be wrong with the settings themselves and with the folders they name.

        Raises ConfigError, or CheckpointError where `out` cannot be resumed.
        """
        for name in ("ranks", "steps", "batch_size", "max_bytes"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_every", "eval_every", "trace_every"):
            _at_least(name, getattr(self, name), 0)
        for name, low in (("timeout_s", 1), ("seed", 0)):
            _at_least(name, getattr(self, name), low)
            if getattr(self, name) > MOST:
                raise ConfigError(f"{getattr(self, name)} is too large; use at most {MOST}", setting=name)
        if self.sequence_length is not None:
            _at_least("sequence_length", self.sequence_length, 2)
        if not 0 < self.learning_rate < 10:
            raise ConfigError(
                f"{self.learning_rate} is not a learning rate; use one between 0 and 10",
                setting="learning_rate",
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.dtype!r} is unknown; use {' or '.join(DTYPES)}", setting="dtype")
        check_meter(self.meter)
        self._check_ep_size()
        require_folder("cache", Path(self.cache).expanduser())
        self.folder.check(self.identity(), resume=self.resume, overwrite=self.overwrite)

    def _check_ep_size(self) -> None:
        if self.ep_size is not None and (self.ep_size < 1 or self.ranks % self.ep_size):
            divisors = ", ".join(str(n) for n in range(1, self.ranks + 1) if self.ranks % n == 0)
            raise ConfigError(
                f"{self.ep_size} does not divide ranks={self.ranks}; use one of {divisors}", setting="ep_size"
            )
        if self.trace_every and self.group_size == 1:
            raise ConfigError(
                "routing is recorded between ranks that share experts; use at least 2", setting="ranks"
            )

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.out).expanduser())

    @property
    def group_size(self) -> int:
        """Ranks that share one set of experts."""
        return self.ep_size if self.ep_size is not None else self.ranks

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "data": list(self.data)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        experts = AdaptiveSettings(**values["experts"])
        return cls(**{**values, "experts": experts, "data": tuple(values["data"])})

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with its beginning: all that shapes the model, data and updates.

        The planner may change: it decides who computes, not what.
        """
        kept = (
            "model", "data", "ranks", "ep_size", "steps", "batch_size", "sequence_length", "learning_rate",
            "dtype", "seed", "max_bytes",
        )  # fmt: skip
        values = self.to_dict()
        return {name: values[name] for name in kept}


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{value} is too small; use at least {low}", setting=name)
