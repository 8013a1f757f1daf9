"""Memory for pages of keys and values, one pool a format."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anabranch.errors import ConfigError
from anabranch.scheduling.pages import PAGE
from anabranch.serving import huge_pages

# As in pages.h: a page's number carries its format above this bit.
FORMAT_SHIFT = 28
FORMATS = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class KvShape:
    """Sizes of one token's keys and values: layers, key-value heads and their dimension."""

    layers: int
    heads: int
    dim: int

    def page_bytes(self, kind: str) -> int:
        """Of one page of 16 tokens, scales and zeros included; as `PageShape` of pages.h counts."""
        numbers, lines = 2 * PAGE * self.dim, self.dim + PAGE
        one = {
            "float32": 4 * numbers,
            "bfloat16": 2 * numbers,
            "int8": numbers,
            "int4": numbers // 2 + 4 * lines,
        }
        return self.layers * self.heads * one[kind]


def kv_shape_of(model: PreTrainedModel) -> KvShape:
    """Sizes of the model's cached keys and values, by its configuration. Raises ConfigError for latent ones."""
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError("latent attention (MLA) is not computed", setting="model")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KvShape(config.num_hidden_layers, heads, dim)


def first_page(kind: str) -> int:
    """Number of a format's first page. Raises ConfigError for an unknown format."""
    if kind not in FORMATS:
        raise ConfigError(f"{kind!r} is not known; choose of {', '.join(FORMATS)}", setting="kv_dtype")
    return FORMATS.index(kind) << FORMAT_SHIFT


def allocate(shape: KvShape, kind: str, pages: int, device: torch.device | None = None) -> Tensor:
    """uint8 (pages, layers * heads, bytes of a head) on `device`, the CPU where it is None; there of huge memory pages
    where the system grants them. Raises ConfigError where it has not that much memory.

    In memory a layer and head has all its pages one after the other: what a step reads of a chain is a stream.
    """
    parts = shape.layers * shape.heads
    size = torch.Size((parts, pages, shape.page_bytes(kind) // parts))
    try:
        if device is None or device.type == "cpu":
            return huge_pages.empty(size, torch.uint8).transpose(0, 1)
        return torch.empty(size, dtype=torch.uint8, device=device).transpose(0, 1)
    except (OSError, OverflowError, torch.OutOfMemoryError) as error:
        mib = pages * shape.page_bytes(kind) >> 20
        raise ConfigError(
            f"the system does not grant {mib} MiB for pages; ask for less", setting="kv_memory_mib"
        ) from error


def decode(shape: KvShape, kind: str, raw_PB: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (P, layers, heads, dim, 16) and values (P, layers, heads, 16, dim) of pages, fp32: the reference of what
    attend.h reads."""
    head_bytes = shape.page_bytes(kind) // (shape.layers * shape.heads)
    raw = raw_PB.reshape(-1, shape.layers, shape.heads, head_bytes)
    numbers, dim = PAGE * shape.dim, shape.dim
    if kind != "int4":
        keys, values = raw.view(getattr(torch, kind)).split(numbers, -1)
        if kind == "float32":
            return keys.unflatten(-1, (dim, PAGE)), values.unflatten(-1, (PAGE, dim))
        read = _parted if kind == "bfloat16" else _scaled
        return read(keys, PAGE).float(), read(values, dim).float()
    codes = torch.stack([raw[..., :numbers] & 15, raw[..., :numbers] >> 4], -1).flatten(-2)
    keys, values = _parted(codes[..., :numbers], PAGE), _parted(codes[..., numbers:], dim)
    lines = raw[..., numbers:].view(torch.bfloat16).float().unsqueeze(-1).split([dim, dim, PAGE, PAGE], -2)
    return lines[1] + lines[0] * keys, lines[3] + lines[2] * values


def _scaled(codes: Tensor, line: int) -> Tensor:
    """Lines of int8 codes, each times its scale, whose eight bits are the lowest ones of the first codes: of all lines
    the first bit, then of all the second, and so on."""
    lines = codes.shape[-1] // line
    bits = codes[..., : 8 * lines].unflatten(-1, (8, lines)) & 1
    place = (bits.int() << torch.arange(8).unsqueeze(-1)).sum(-2)
    return _parted(codes, line) * torch.exp2(place.unsqueeze(-1) / 8 - 22)


def _parted(numbers: Tensor, line: int) -> Tensor:
    """Pairs of numbers of two lines each, as lines."""
    return numbers.unflatten(-1, (-1, line, 2)).transpose(-1, -2).flatten(-3, -2)
