"""A checkpoint read tensor by tensor, for models that do not fit into memory at once.

Tensors are read by their place in the safetensors files, not mapped: no page of a file stays in this process. Experts
may lie one by one, as transformers writes them, or fused as its modules hold them.

Shape suffixes: D hidden size, F width of an expert, X gates and ups.
"""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from anabranch.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Mixtral's files call things by other names than its modules do.
MLP_NAMES = ("mlp", "block_sparse_moe")
EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
MOST_BYTES = 1 << 30  # of one read: the system takes less than 2 GiB

Module = TypeVar("Module", bound=nn.Module)


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder that `save_pretrained` wrote. Raises CheckpointError where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        index = self.folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
        self.paths = [self.folder / name for name in sorted(names)]
        self._places: dict[str, Place] = {}
        for path in self.paths:
            self._places.update(_places(path))

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model without its layers' weights: `filled` reads those. dtype: None for the checkpoint's own."""
        config = AutoConfig.from_pretrained(self.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
        inner: Any = model.model
        # Its frequencies are no parameters: a module built anew has them.
        inner.rotary_emb = type(inner.rotary_emb)(config=config)
        inner.embed_tokens = self.filled(inner.embed_tokens, "model.embed_tokens")
        inner.norm = self.filled(inner.norm, "model.norm")
        tied = "lm_head.weight" not in self._places
        model.lm_head = self.filled(model.lm_head, "model.embed_tokens" if tied else "lm_head")
        if tied:
            model.lm_head.weight = inner.embed_tokens.weight
        return model.eval()

    def filled(self, module: Module, prefix: str) -> Module:
        """A copy of a module without weights, with those of the checkpoint except of experts."""
        made = copy.deepcopy(module)
        # Rounded to the module's precision, as transformers does.
        state = {
            name: self.read(f"{prefix}.{name}").to(parameter.dtype)
            for name, parameter in made.named_parameters()
            if not name.startswith("mlp.experts.")
        }
        made.load_state_dict(state, strict=False, assign=True)
        return made

    def expert(self, layer: int, number: int) -> tuple[Tensor, Tensor]:
        """gate_up_XD (gates, then ups) and down_DF of one expert."""
        for mlp in MLP_NAMES:
            base = f"model.layers.{layer}.{mlp}.experts"
            if f"{base}.gate_up_proj" in self._places:
                return self.read(f"{base}.gate_up_proj", number), self.read(f"{base}.down_proj", number)
            for names in EXPERT_NAMES:
                gate, up, down = (f"{base}.{number}.{name}.weight" for name in names)
                if gate in self._places:
                    return torch.cat([self.read(gate), self.read(up)]), self.read(down)
        raise CheckpointError(f"{self.folder} has no expert {number} of layer {layer}", setting="model")

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it. Raises CheckpointError for one that is missing or cut off."""
        place = self._place(name)
        shape, offset = place.shape, place.offset
        if row is not None:
            shape = shape[1:]
            offset += row * math.prod(shape) * place.dtype.itemsize
        tensor = torch.empty(shape, dtype=place.dtype)
        into = tensor.view(-1).view(torch.uint8).numpy().data
        file = os.open(place.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(into):
                count = os.preadv(file, [into[done : done + MOST_BYTES]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{place.path} ends within {name}", setting="model")
                done += count
            os.posix_fadvise(file, offset, len(into), os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
        return tensor

    def _place(self, name: str) -> Place:
        ours, theirs = MLP_NAMES
        for known in (name, name.replace(f".{ours}.", f".{theirs}.")):
            if known in self._places:
                return self._places[known]
        raise CheckpointError(f"{self.folder} has no tensor {name}", setting="model")


def _places(path: Path) -> dict[str, Place]:
    """A safetensors file: the length of its header (8 bytes, little-endian), the header as JSON, the numbers."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: Place(
                path, 8 + length + about["data_offsets"][0], DTYPES[about["dtype"]], tuple(about["shape"])
            )
            for name, about in header.items()
        }
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file of floating-point weights ({error!r})", setting="model"
        ) from None
