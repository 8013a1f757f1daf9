"""What the recipes' models have in common: four special tokens, a tokenizer that knows words only, a tiny MoE."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

SPECIAL = ("<pad>", "<eos>", "<think>", "</think>")
PAD, EOS, THINK, THOUGHT = range(len(SPECIAL))


def word_tokenizer(words: Sequence[str], splitter: Any, decoder: Any = None) -> PreTrainedTokenizerFast:
    """For `save_pretrained`. words: SPECIAL first. splitter, decoder: how text becomes words, and they text again."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = splitter
    if decoder is not None:
        inner.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<think>", "</think>"],
    )


def moe_config(vocab: int, layers: int, positions: int) -> Qwen3MoeConfig:
    """Eight experts, two of them for a token."""
    return Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # pyright: ignore[reportCallIssue] - a dataclass by decorator
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
