"""A model folder as `save_pretrained` writes it, for serving."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anabranch.errors import CheckpointError, ConfigError

DTYPES = {None: "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


class Loaded(NamedTuple):
    """A model, its tokenizer, and the tokens after which its chains end."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: frozenset[int]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises as `load`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; models are not downloaded", setting="model")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer: {error}", setting="model") from error


def load(folder: Path, dtype: str | None) -> Loaded:
    """dtype: as in EngineSettings. Raises ConfigError without such a folder, CheckpointError for what it holds."""
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no model to serve: {error}", setting="model") from error
    named = model.generation_config.eos_token_id
    ends = [] if named is None else [named] if isinstance(named, int) else list(named)
    end = tokenizer.eos_token_id
    if isinstance(end, int):
        ends.append(end)
    return Loaded(model, tokenizer, frozenset(ends))
