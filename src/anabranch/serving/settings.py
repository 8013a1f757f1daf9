"""How a model is served."""

from dataclasses import dataclass, field

import torch

from anabranch.errors import ConfigError
from anabranch.scheduling.eviction import require_budget
from anabranch.scheduling.pages import PAGE
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.pools import first_page
from anabranch.serving.step.native import WEIGHTS

STEPS = ("auto", "native", "torch", "compiled")


@dataclass(frozen=True)
class EngineSettings:
    """How a model is served. Raises ConfigError naming the setting."""

    # Of weights: "float32", "bfloat16" or "int8" (the native step's; activations are bf16); None for the model's own.
    dtype: str | None = None
    # Of cached keys and values: "float32", "bfloat16", "int8" or "int4"; None for `dtype`.
    kv_dtype: str | None = None
    # Memory for keys and values.
    kv_memory_mib: int = 512
    # Threads of the native step; None for the cores of this machine.
    threads: int | None = None
    # "native" (C++, on CPU), "torch" (transformers' modules), "compiled" (these, decoding compiled at fixed shapes), or
    # "auto": native where it can, else torch.
    step: str = "auto"
    # Chains at once, prompt tokens a step, tokens of a chain.
    limits: Limits = field(default_factory=Limits)
    # Tokens guessed ahead of a chain at most, where that pays; 0 for none. The output stays what it is without.
    speculate: int = 0
    # Memory for weights: experts that do not fit stay on disk (`Engine.from_folder`). None for all in memory.
    memory_limit_mib: int | None = None
    # Where those experts are kept, packed: as large as they are, on the fastest disk.
    store_folder: str = "~/.cache/anabranch/store"
    # Tokens that a decoding chain keeps at most: beyond, pages of little attention leave it. None to keep all.
    evict_above: int | None = None
    # Memory for pages of preempted chains, which are computed once more where it is full or 0.
    spill_mib: int = 0
    # Folder for these pages; None for host memory.
    spill_folder: str | None = None

    @property
    def load_dtype(self) -> torch.dtype | None:
        """What a checkpoint is read as; None for its own. int8 weights are made of the checkpoint's own numbers."""
        return None if self.dtype in (None, "int8") else getattr(torch, self.dtype)

    def __post_init__(self) -> None:
        for name, value, known in (("dtype", self.dtype, (None, *WEIGHTS)), ("step", self.step, STEPS)):
            if value not in known:
                raise ConfigError(
                    f"{value!r} is not known; choose of {', '.join(map(str, known))}", setting=name
                )
        if self.kv_dtype is not None:
            first_page(self.kv_dtype)
        if self.kv_memory_mib < 1:
            raise ConfigError("must be at least 1", setting="kv_memory_mib")
        for name, value in (("threads", self.threads), ("memory_limit_mib", self.memory_limit_mib)):
            if value is not None and value < 1:
                raise ConfigError("must be at least 1", setting=name)
        if self.memory_limit_mib is not None and self.step not in ("auto", "native"):
            raise ConfigError(
                f"the {self.step} step holds the whole model; use step='native'", setting="memory_limit_mib"
            )
        if self.evict_above is not None:
            require_budget(self.evict_above)
        if self.spill_mib < 0:
            raise ConfigError("must be at least 0", setting="spill_mib")
        if self.spill_folder is not None and self.spill_mib == 0:
            raise ConfigError("wants spill_mib, how much the folder may hold", setting="spill_folder")
        if not 0 <= self.speculate < PAGE:
            raise ConfigError(f"must lie in 0 to {PAGE - 1}, not {self.speculate}", setting="speculate")
