"""A model folder as `save_pretrained` writes it, for serving."""

import hashlib
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from anabranch.errors import CheckpointError, ConfigError
from anabranch.integrations.transformers import NAME, adaptive_layers

# Of each file: a file that is no larger than all of them is read whole.
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ConfigError without such a folder, CheckpointError for what it holds."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; models are not downloaded", setting="model")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no model to serve: it has no config.json", setting="model")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer: {error}", setting="model") from error


def load_model(
    folder: Path, dtype: torch.dtype | None, sharding: DistributedConfig | None = None
) -> PreTrainedModel:
    """In evaluation mode. dtype: None for the checkpoint's own. Raises CheckpointError for what the folder holds."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", distributed_config=sharding
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no model to serve: {error}", setting="model") from error
    return model.eval()


def load_spread(folder: Path, dtype: torch.dtype | None, ranks: int) -> PreTrainedModel:
    """The same with its experts divided over all ranks. What else is divided is gathered at the first step, and kept.

    Collective, after `anabranch.enable`. Raises as `load_model`, and ConfigError for a model without experts.
    """
    model = load_model(
        folder, dtype, DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=NAME)
    )
    if not adaptive_layers(model):
        raise ConfigError(f"{folder} has no experts that could be spread; use ranks=1", setting="ranks")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False)
    return model


def fingerprint(folder: Path) -> str:
    """Tells one model from another at the same path: all of its small files, and samples of its weights."""
    digest = hashlib.sha256()
    for file in sorted(
        (*folder.glob("*config.json"), *folder.glob("tokenizer*"), *folder.glob("*.safetensors"))
    ):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for part in range(SAMPLES):
                content.seek(max(0, size - SAMPLE_BYTES) * part // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def positions_of(config: PreTrainedConfig) -> int:
    """Tokens that a chain of a model of this configuration can have at most."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def load_config(folder: Path) -> PreTrainedConfig:
    """Raises CheckpointError for what the folder holds."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no model to serve: {error}", setting="model") from error


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Those that the model's folder names, and the tokenizer's own. Raises as `load_tokenizer`."""
    if (folder / "generation_config.json").is_file():
        try:
            named = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} holds no model to serve: {error}", setting="model") from error
    else:
        named = getattr(load_config(folder).get_text_config(), "eos_token_id", None)
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(end for end in ends if isinstance(end, int))
