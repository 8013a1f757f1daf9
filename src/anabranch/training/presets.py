"""The built-in models: small Qwen3-MoE shapes that train on a laptop's cores."""

from typing import NamedTuple

from transformers import PreTrainedConfig, Qwen3MoeConfig


class Preset(NamedTuple):
    """A model to train from scratch, and the text window it is meant for."""

    config: PreTrainedConfig
    sequence_length: int


def _qwen3_moe(
    hidden: int, layers: int, heads: int, experts: int, width: int, vocab: int, top_k: int = 4
) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=hidden // heads,  # pyright: ignore[reportCallIssue] - a dataclass by decorator
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def presets() -> dict[str, Preset]:
    """Built anew at each call, since a configuration may be changed by the model built from it."""
    return {
        "tiny": Preset(
            _qwen3_moe(hidden=128, layers=4, heads=4, experts=16, width=256, vocab=4096), sequence_length=256
        ),
        # Eight of many experts a token, as the large models route: what crosses between ranks differs most there.
        "tiny8": Preset(
            _qwen3_moe(hidden=128, layers=2, heads=4, experts=32, width=512, vocab=2048, top_k=8),
            sequence_length=256,
        ),
        "small": Preset(
            _qwen3_moe(hidden=384, layers=8, heads=6, experts=32, width=512, vocab=16384), sequence_length=512
        ),
    }
