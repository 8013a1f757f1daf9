"""Where a run's model comes from: a preset, a configuration, or a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from anabranch.errors import CheckpointError, ConfigError
from anabranch.training.presets import presets


@dataclass(frozen=True)
class Origin:
    """A model before it is loaded. `weights`: the folder that holds them, None to train from scratch."""

    config: PreTrainedConfig
    weights: Path | None
    sequence_length: int

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The checkpoint's own tokenizer; None where the model has none and one is to be trained."""
        if self.weights is None or not (self.weights / "tokenizer.json").exists():
            return None
        return AutoTokenizer.from_pretrained(self.weights)

    def write_initial(self, folder: Path, seed: int) -> None:
        """Save freshly initialised weights, the same for the same seed, for every rank to load its share of."""
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).save_pretrained(folder)


def find_origin(model: str, sequence_length: int | None) -> Origin:
    """Resolve the `model` setting. Raises ConfigError or CheckpointError naming what is missing."""
    known = presets()
    if model in known:
        preset = known[model]
        return Origin(preset.config, None, sequence_length or preset.sequence_length)
    path = Path(model).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{model!r} is neither a preset ({', '.join(known)}) nor a folder or configuration file here; "
            "models are not downloaded",
            setting="model",
        )
    config = _read_config(path)
    if not getattr(config, "base_model_ep_plan", None):
        raise ConfigError(
            f"{config.model_type} has no expert-parallel plan in transformers: nothing to balance", setting="model"
        )
    held = path.is_dir() and any(path.glob("*.safetensors"))
    longest = getattr(config, "max_position_embeddings", None) or 512
    return Origin(config, path if held else None, sequence_length or min(512, longest))


def _read_config(path: Path) -> PreTrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(f"{path} holds no config.json", setting="model")
    try:
        return AutoConfig.from_pretrained(file)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{file} is not a model configuration: {error}", setting="model") from error
