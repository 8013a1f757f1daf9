"""Adaptive expert parallelism for the Mixture-of-Experts models of Hugging Face transformers.

import anabranch
anabranch.enable()
model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(
    fsdp_size=2, ep_size=2, ep_implementation="anabranch"))
"""

from anabranch.errors import AnabranchError

__version__ = "0.1.0"
__all__ = ["AnabranchError", "__version__", "enable"]


def enable(
    planner: str = "bounded",
    epsilon: float = 0.05,
    slots: int = 2,
    transport: str = "auto",
    chunks: int = 1,
    dispatch_wire: str = "none",
    combine_wire: str = "none",
    cache: str = "~/.cache/anabranch",
) -> None:
    """Register `ep_implementation="anabranch"` with transformers, for models loaded from now on.

    planner: who computes which rows. "bounded" moves rows only where a rank's load exceeds the mean by more
        than epsilon; "exact" levels all ranks; "static" never moves; "least_loaded" and
        "periodic_replication" are published policies to compare with; "auto" chooses by cost.
    epsilon: load above the mean that "bounded" tolerates, as a fraction.
    slots: guest experts a rank may host at once under "bounded".
    transport: how rows travel: "all_to_all", "dedup", "two_level", "all_gather", or "auto", which chooses by cost.
    chunks: pieces of a micro-batch whose exchange and computation overlap, for "dedup" and "two_level".
    dispatch_wire, combine_wire: precision of rows between ranks, there and back: "none" (as they are), "bf16",
        "int8", "int8_stochastic" or "fp8". With "two_level" only between nodes.
    cache: folder for the measurements behind "auto", taken at the first training step on new hosts or shapes.

    Call it on every rank with the same arguments, before `from_pretrained`. Raises ConfigError naming the
    setting, before anything is registered.
    """
    # Imported here so that the planning half of the package works where torch is not installed.
    from pathlib import Path

    from anabranch.costs.calibrate import Calibration
    from anabranch.integrations.transformers import AdaptiveSettings, register

    settings = AdaptiveSettings(planner, epsilon, slots, transport, chunks, dispatch_wire, combine_wire)
    register(settings, Calibration(Path(cache).expanduser() / "calibration"))
