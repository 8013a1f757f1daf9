"""Where a run's model comes from: a preset, a configuration, or a checkpoint."""

import copy
import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from anabranch.errors import CheckpointError, ConfigError
from anabranch.placement.base import Homes
from anabranch.training.presets import presets

# What building a model from contradictory numbers may raise.
UNBUILDABLE = (ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError, KeyError)


@dataclass(frozen=True)
class Origin:
    """A model before it is loaded.

    folder: what `model` named, None for a preset. weights: the folder that holds them, None to train from
    scratch.
    """

    config: PreTrainedConfig
    folder: Path | None
    weights: Path | None
    sequence_length: int

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @cached_property
    def experts(self) -> int:
        """Experts of a layer, by the model's own plan. Raises CheckpointError where it cannot be built."""
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config))
        except UNBUILDABLE as error:
            raise CheckpointError(
                f"no {self.config.model_type} model can be built from this configuration: {error}",
                setting="model",
            ) from error
        rules = [name for name, style in model.ep_plan.items() if style == "grouped_gemm"]
        for name, parameter in model.named_parameters():
            if any(fnmatch(name, rule) for rule in rules):
                return parameter.shape[0]
        raise ConfigError(
            f"{self.config.model_type} has no layer of experts to balance; use a Mixture-of-Experts model",
            setting="model",
        )

    def homes(self, ranks: int) -> Homes:
        """Where the experts live on that many ranks. Raises ConfigError for more ranks than experts."""
        if ranks > self.experts:
            raise ConfigError(
                f"{ranks} ranks would share {self.experts} experts; use at most {self.experts}",
                setting="ep_size",
            )
        return Homes.contiguous(self.experts, ranks)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's own; None where one is to be trained. CheckpointError for one of no use."""
        if self.folder is None or not (self.folder / "tokenizer.json").is_file():
            if self.weights is not None:
                raise CheckpointError(
                    f"{self.weights} has weights but no tokenizer.json; put the model's own beside them",
                    setting="model",
                )
            return None
        file = self.folder / "tokenizer.json"
        try:
            # Looked at first: for what is no tokenizer at all, the library raises anything.
            if "model" not in dict(json.loads(file.read_bytes())):
                raise KeyError("model")
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (ValueError, TypeError, OSError, KeyError) as error:
            raise CheckpointError(f"{file} is not a tokenizer: {error}", setting="model") from error
        if len(tokenizer) > self.vocab_size:
            raise CheckpointError(
                f"{file} has {len(tokenizer)} tokens, more than the model's {self.vocab_size}; use its own",
                setting="model",
            )
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"{file} names no end-of-text token; set eos_token", setting="model")
        return tokenizer

    def digest(self) -> str:
        """The same for the same architecture."""
        values = self.config.to_dict()
        values.pop("transformers_version", None)
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def write_initial(self, folder: Path, seed: int) -> None:
        """Save new weights, the same for the same seed, for every rank to load its share of."""
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).save_pretrained(folder)


def find_origin(model: str, sequence_length: int | None) -> Origin:
    """Resolve the `model` setting. Raises ConfigError or CheckpointError naming what is missing."""
    known = presets()
    path = Path(model).expanduser()
    if model in known:
        config, folder, meant = known[model].config, None, known[model].sequence_length
    elif path.exists():
        config, folder, meant = _read_config(path), path if path.is_dir() else None, 512
    else:
        raise ConfigError(
            f"{model!r} is neither a preset ({', '.join(known)}) nor a folder or configuration file here; "
            "models are not downloaded",
            setting="model",
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or meant
    if sequence_length is not None and sequence_length > longest:
        raise ConfigError(
            f"{sequence_length} is more than the model's max_position_embeddings={longest}; use at most that",
            setting="sequence_length",
        )
    weights = None if folder is None else _weights(folder)
    return Origin(config, folder, weights, sequence_length or min(meant, longest))


def _read_config(path: Path) -> PreTrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} holds no config.json; name a folder that does", setting="model")
    try:
        config = AutoConfig.from_pretrained(file)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{file} is not a model configuration: {error}", setting="model") from error
    if not getattr(config.get_text_config(), "base_model_ep_plan", None):
        raise ConfigError(
            f"{config.model_type} has no expert-parallel plan in transformers; use a MoE model that has",
            setting="model",
        )
    top_k, experts = (getattr(config, name, None) for name in ("num_experts_per_tok", "num_experts"))
    if top_k is not None and experts is not None and not 1 <= top_k <= experts:
        raise CheckpointError(
            f"{file}: num_experts_per_tok={top_k} of num_experts={experts}; correct one of them",
            setting="model",
        )
    return config


def _weights(folder: Path) -> Path | None:
    if any(folder.glob("*.safetensors")):
        return folder
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} has weights in pytorch_model.bin only; save them as safetensors", setting="model"
        )
    return None
