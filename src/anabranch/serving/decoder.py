"""A transformers model as the plain decoder that the C++ step computes: sizes, and which module holds what.

Shape suffixes: D hidden size, E experts, F width of an expert, N outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from anabranch.errors import ConfigError

# Families whose forward is that of `Decoder`, read and compared token by token in tests/serving.
FAMILIES = ("llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
# transformers' Mixtral always lets the chosen experts' weights sum to one and has no setting for it.
ALWAYS_NORMALISED = ("mixtral",)
# Rotary embeddings whose angles depend on the longest chain that transformers computes with.
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Experts:
    """Experts of one layer, or its one dense feed-forward: gate_up_EXD (gates, then ups) and down_EDF.

    router_ED is None for a dense layer.
    """

    gate_up_EXD: Tensor
    down_EDF: Tensor
    router_ED: Tensor | None
    top_k: int
    shared: "Experts | None" = None
    shared_gate_D: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """qkv_ND: rows of queries, then keys, then values."""

    qkv_ND: Tensor
    qkv_bias_N: Tensor | None
    out_DN: Tensor
    out_bias_D: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class Layer:
    """Norm, attention, norm, experts."""

    attention_norm_D: Tensor
    attention: Attention
    mlp_norm_D: Tensor
    experts: Experts


@dataclass(frozen=True)
class Decoder:
    """A whole model. qk_norm_all: queries and keys are normalised over all heads at once, not head by head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    normalise_top_k: bool
    qk_norm_all: bool
    embedding_VD: Tensor
    layers: "Layers"
    final_norm_D: Tensor
    head_VD: Tensor
    rotary: nn.Module

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding: fp32 (positions, rotary dimensions / 2)."""
        at = torch.arange(positions, device=self.head_VD.device).unsqueeze(0)
        like = torch.zeros(1, dtype=torch.float32, device=self.head_VD.device)
        cosine, sine = self.rotary(like, at)
        half = cosine.shape[-1] // 2
        return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


class Layers(Sequence[Layer]):
    """The layers of a model. Where their modules have no weights, layers are of meta tensors: `read` gets a whole one.

    fill: gives a module the weights it lacks, by its name in the model.
    """

    def __init__(
        self, modules: Sequence[Any], config: Any, fill: Callable[[Any, str], Any] | None = None
    ) -> None:
        self.modules, self.config, self.fill = modules, config, fill

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, number: int) -> Layer:
        return _layer(self.modules[number], self.config)

    def read(self, number: int) -> Layer:
        """A layer with its weights, but those of experts: kept only by who asks, so that not all are in memory."""
        if self.fill is None:
            return self[number]
        return _layer(self.fill(self.modules[number], f"model.layers.{number}"), self.config)


def read_decoder(model: PreTrainedModel, fill: Callable[[Any, str], Any] | None = None) -> Decoder:
    """The decoder in `model`, whose tensors it shares; layers get missing weights by `fill`.

    Raises ConfigError naming the model's property that a `Decoder` cannot express; the torch step runs such models.
    """
    config: Any = model.config
    family = config.model_type
    _require(family in FAMILIES, f"family {family!r} is not one of {', '.join(FAMILIES)}")
    _require(config.hidden_act == "silu", f"activation {config.hidden_act!r} is not silu")
    _require(getattr(config, "clip_qkv", None) is None, "clipped queries, keys and values")
    _require(
        config.rope_parameters.get("rope_type") not in LENGTH_DEPENDENT,
        "a rotary embedding that changes with length",
    )
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    _require(not sharded, "its parameters are spread over ranks")
    inner: Any = model.model
    head: Any = model.get_output_embeddings()
    first, heads = Layers(inner.layers, config)[0].attention, config.num_attention_heads
    head_dim = inner.layers[0].self_attn.head_dim
    return Decoder(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        normalise_top_k=family in ALWAYS_NORMALISED or bool(getattr(config, "norm_topk_prob", False)),
        qk_norm_all=first.q_norm is not None and first.q_norm.numel() != head_dim,
        embedding_VD=inner.embed_tokens.weight.detach(),
        layers=Layers(inner.layers, config, fill),
        final_norm_D=inner.norm.weight.detach(),
        head_VD=head.weight.detach(),
        rotary=inner.rotary_emb,
    )


def _layer(layer: Any, config: Any) -> Layer:
    attention = layer.self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    biased = parts[0].bias is not None
    return Layer(
        attention_norm_D=layer.input_layernorm.weight.detach(),
        attention=Attention(
            qkv_ND=torch.cat([p.weight.detach() for p in parts]),
            qkv_bias_N=torch.cat([p.bias.detach() for p in parts]) if biased else None,
            out_DN=attention.o_proj.weight.detach(),
            out_bias_D=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
            q_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
            k_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
        ),
        mlp_norm_D=layer.post_attention_layernorm.weight.detach(),
        experts=_experts(layer.mlp, config),
    )


def _experts(mlp: Any, config: Any) -> Experts:
    if not hasattr(mlp, "experts"):
        return _dense(mlp)
    shared = getattr(mlp, "shared_expert", None)
    return Experts(
        gate_up_EXD=mlp.experts.gate_up_proj.detach(),
        down_EDF=mlp.experts.down_proj.detach(),
        router_ED=mlp.gate.weight.detach(),
        top_k=config.num_experts_per_tok,
        shared=None if shared is None else _dense(shared),
        shared_gate_D=None if shared is None else mlp.shared_expert_gate.weight.detach().flatten(),
    )


def _dense(mlp: Any) -> Experts:
    _require(mlp.gate_proj.bias is None and mlp.down_proj.bias is None, "biased feed-forward layers")
    gate_up_XD = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
    return Experts(gate_up_XD.unsqueeze(0), mlp.down_proj.weight.detach().unsqueeze(0), None, 1)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(
            f"the native step does not compute this model ({what}); use step='torch'", setting="step"
        )
