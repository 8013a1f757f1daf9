"""Which step an engine runs, by its settings and what is to be had here."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from anabranch.errors import BuildError, ConfigError
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.decoder import LENGTH_DEPENDENT, read_decoder
from anabranch.serving.loading import positions_of
from anabranch.serving.pools import KvShape
from anabranch.serving.settings import EngineSettings
from anabranch.serving.step.base import Step
from anabranch.serving.step.compiled import CompiledStep
from anabranch.serving.step.native import NativeStep
from anabranch.serving.step.torch_step import TorchStep
from anabranch.serving.store.arena import ExpertStore
from anabranch.serving.store.checkpoint import Checkpoint

SLIDING = "sliding_attention"


class Chosen(NamedTuple):
    """why_not_native: where the C++ step was wanted and transformers' modules stand in for it."""

    step: Step
    why_not_native: str | None = None


def choose_step(
    model: PreTrainedModel, weights: str, shape: KvShape, pools: dict[str, Tensor], settings: EngineSettings,
    limits: Limits, checkpoint: Checkpoint | None,
) -> Chosen:  # fmt: skip
    """weights: their format. checkpoint: what they are in, under a memory limit.

    Raises ConfigError and BuildError where the wanted step is not to be had.
    """
    _require_whole_attention(model, limits.tokens)
    if checkpoint is not None:
        return Chosen(_step_with_store(model, weights, pools, settings, limits, checkpoint))
    wants, why_not_native = settings.step, None
    if wants == "native" and model.device.type != "cpu":
        raise ConfigError(f"the native step runs on CPU, the model is on {model.device}", setting="step")
    if wants == "native" or (wants == "auto" and model.device.type == "cpu"):
        try:
            return Chosen(NativeStep(read_decoder(model), weights, pools, limits.tokens, _threads(settings)))
        except (ConfigError, BuildError) as error:
            if wants == "native":
                raise
            why_not_native = str(error)
    try:
        _require_only_attention(model, limits.tokens)
        if str(model.dtype) != f"torch.{weights}":
            raise ConfigError(f"the torch step runs the model as it is, {model.dtype}", setting="dtype")
        if wants == "compiled":
            return Chosen(CompiledStep(model, shape, pools, limits))
        return Chosen(TorchStep(model, shape, pools), why_not_native)
    except ConfigError as error:
        if why_not_native is None:
            raise
        raise ConfigError(f"{error}; the native step is not to be had: {why_not_native}") from error


def _require_whole_attention(model: PreTrainedModel, tokens: int) -> None:
    """What no step computes: scores that are changed before the softmax, and windows shorter than chains."""
    config: Any = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped or any(hasattr(module, "sinks") for module in model.modules()):
        what = "capped scores" if capped else "attention sinks"
        raise ConfigError(f"its attention has {what}, which are not computed", setting="model")
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) and (kinds is None or SLIDING in kinds)
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window < tokens:
        raise ConfigError(
            f"its layers attend to the last {window} tokens, which is computed for no longer chains; give at most that "
            "many",
            setting="tokens",
        )


def _require_only_attention(model: PreTrainedModel, tokens: int) -> None:
    """What transformers' modules compute over our pages: attention to all tokens before. Raises ConfigError for layers
    that remember otherwise, and for what would depend on the chains beside a chain."""
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", SLIDING}
    if tokens <= (getattr(config, "attention_chunk_size", None) or 0):
        kinds -= {"chunked_attention"}  # as long as there is one chunk
    if kinds or getattr(model, "_is_stateful", False):
        what = ", ".join(sorted(kinds)) or "a state"
        raise ConfigError(f"its layers remember by other means than attention ({what})", setting="model")
    rotary = getattr(config, "rope_parameters", None) or {}
    for kind in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        short = kind.get("original_max_position_embeddings") or positions_of(config)
        if kind.get("rope_type") in LENGTH_DEPENDENT and tokens > short:
            raise ConfigError(
                f"beyond {short} tokens its rotary embedding ({kind['rope_type']}) changes with the longest chain of a "
                "step; give at most that many",
                setting="tokens",
            )


def _step_with_store(
    skeleton: PreTrainedModel, weights: str, pools: dict[str, Tensor], settings: EngineSettings, limits: Limits,
    checkpoint: Checkpoint,
) -> NativeStep:  # fmt: skip
    assert settings.memory_limit_mib is not None
    decoder = read_decoder(skeleton, checkpoint.filled)
    store = ExpertStore(checkpoint, decoder, weights, settings.memory_limit_mib, Path(settings.store_folder))
    return NativeStep(decoder, weights, pools, limits.tokens, _threads(settings), store)


def _threads(settings: EngineSettings) -> int:
    return settings.threads or os.cpu_count() or 1
