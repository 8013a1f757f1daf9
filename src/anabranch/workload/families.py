"""Families of Hugging Face models: what each one's config means, as transformers 5.24 builds it.

Where transformers assumes a size that a config leaves out, we do not, except for the usual "as many as heads". Every
family is compared with the instantiated model in tests/workload/test_real_params.py.
"""

from collections.abc import Callable
from typing import Any

from anabranch.workload.blocks import Attention, DenseFeedForward, Experts, Latent
from anabranch.workload.fields import Fields
from anabranch.workload.shape import ModelShape, Norms

Family = Callable[[Fields], ModelShape]


def _shape(f: Fields, attention: Attention, **rest: Any) -> ModelShape:
    """The sizes that all families write alike; `rest` overrides them."""
    sizes: dict[str, Any] = {
        "family": f.text("model_type"),
        "vocab": f.count("vocab_size"),
        "hidden": f.count("hidden_size"),
        "layers": f.count("num_hidden_layers"),
        "tied": f.flag("tie_word_embeddings"),
    }
    sizes |= rest
    return ModelShape(attention=attention, **sizes)


def _attention(
    f: Fields, qkv_bias: bool | None = None, out_bias: bool | None = None, **rest: Any
) -> Attention:
    """Grouped queries; biases are `attention_bias` unless given."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    kv_heads = f.count("num_key_value_heads", default=heads)
    if heads % kv_heads:
        f.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    head_dim = f.given("head_dim")
    if head_dim is None and hidden % heads:
        f.fail(
            "num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and head_dim is missing"
        )
    bias = f.flag("attention_bias")
    return Attention(
        heads, kv_heads, head_dim or hidden // heads,
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        out_bias=bias if out_bias is None else out_bias,
        **rest,
    )  # fmt: skip


def _window(f: Fields, otherwise: Callable[[int], bool], size: str = "sliding_window") -> dict[str, Any]:
    """Which layers have a window: those of `layer_types`, and where that is absent those that `otherwise` names."""
    layers = f.count("num_hidden_layers")
    windowed = f.windowed(layers)
    if windowed is None:
        windowed = tuple(i for i in range(layers) if otherwise(i))
    return {"windowed": windowed, "window": f.count(size) if windowed else None}


def _late_window(f: Fields) -> dict[str, Any]:
    """Qwen's: a window from `max_window_layers` on, where it is used at all."""
    used, first = f.flag("use_sliding_window"), f.count("max_window_layers", least=0, default=0)
    return _window(f, lambda i: used and i >= first)


def _dense(f: Fields, width: str = "intermediate_size") -> DenseFeedForward:
    return DenseFeedForward(f.count(width), bias=f.flag("mlp_bias"))


def _experts(f: Fields, count: str, width: str, layers: Callable[[int], bool] | None = None,
             top_k: str = "num_experts_per_tok", **rest: Any) -> Experts:  # fmt: skip
    """Experts in the layers that `layers` names, in all by default."""
    experts, chosen = f.count(count), f.count(top_k)
    if chosen > experts:
        f.fail(top_k, f"{chosen} experts a token, but {count} is {experts}")
    where = tuple(i for i in range(f.count("num_hidden_layers")) if layers is None or layers(i))
    return Experts(experts, chosen, f.count(width), where, **rest)


def _sparse(f: Fields) -> Callable[[int], bool]:
    """Qwen's: every `decoder_sparse_step`-th layer has experts, except those of `mlp_only_layers`."""
    step = f.count("decoder_sparse_step", default=1)
    dense = f.indices("mlp_only_layers", f.count("num_hidden_layers")) or ()
    return lambda i: i not in dense and (i + 1) % step == 0


def _mixture(f: Fields, experts: Experts, attention: Attention, **rest: Any) -> ModelShape:
    """A model whose layers without experts have a dense feed-forward of `intermediate_size`."""
    some_dense = len(experts.layers) < f.count("num_hidden_layers")
    return _shape(f, attention, experts=experts, dense=_dense(f) if some_dense else None, **rest)


def _llama(f: Fields) -> ModelShape:
    return _shape(f, _attention(f), dense=_dense(f))


def _mistral(f: Fields) -> ModelShape:
    windows = _window(f, lambda _: f.given("sliding_window") is not None)
    return _shape(f, _attention(f, **windows), dense=_dense(f))


def _qwen2(f: Fields) -> ModelShape:
    return _shape(f, _attention(f, True, False, **_late_window(f)), dense=_dense(f))


def _qwen3(f: Fields) -> ModelShape:
    f.count("head_dim")
    return _shape(f, _attention(f, qk_norm="head", **_late_window(f)), dense=_dense(f))


def _gemma2(f: Fields) -> ModelShape:
    f.count("head_dim")
    attention = _attention(f, **_window(f, lambda i: i % 2 == 0))
    tied = f.flag("tie_word_embeddings", True)
    return _shape(f, attention, dense=_dense(f), norms=Norms(4), tied=tied)


def _gemma3(f: Fields) -> ModelShape:
    f.count("head_dim")
    every = f.count("sliding_window_pattern", default=6)
    attention = _attention(f, qk_norm="head", **_window(f, lambda i: (i + 1) % every != 0))
    tied = f.flag("tie_word_embeddings", True)
    return _shape(f, attention, dense=_dense(f), norms=Norms(4), tied=tied)


def _gpt2(f: Fields) -> ModelShape:
    hidden, heads = f.count("n_embd"), f.count("n_head")
    if hidden % heads:
        f.fail("n_head", f"{heads} does not divide n_embd {hidden}")
    return ModelShape(
        "gpt2", f.count("vocab_size"), hidden, f.count("n_layer"),
        Attention(heads, heads, hidden // heads, qkv_bias=True, out_bias=True),
        DenseFeedForward(f.count("n_inner", default=4 * hidden), gated=False, bias=True),
        norms=Norms(bias=True), tied=f.flag("tie_word_embeddings", True), positions=f.count("n_positions"),
        dropout=f.positive("resid_pdrop", 0.1),
    )  # fmt: skip


def _gpt_neox(f: Fields) -> ModelShape:
    bias = f.flag("attention_bias", True)
    dense = DenseFeedForward(f.count("intermediate_size"), gated=False, bias=True)
    dropout = f.positive("hidden_dropout", 0.0)
    return _shape(f, _attention(f, bias, bias), dense=dense, norms=Norms(bias=True), dropout=dropout)


def _mixtral(f: Fields) -> ModelShape:
    windows = _window(f, lambda _: f.given("sliding_window") is not None)
    experts = _experts(f, "num_local_experts", "intermediate_size")
    return _mixture(f, experts, _attention(f, False, False, **windows))


def _granitemoe(f: Fields) -> ModelShape:
    return _mixture(f, _experts(f, "num_local_experts", "intermediate_size"), _attention(f))


def _phimoe(f: Fields) -> ModelShape:
    windows = _window(f, lambda _: f.given("sliding_window") is not None)
    experts = _experts(f, "num_local_experts", "intermediate_size")
    head_bias = f.flag("lm_head_bias")
    return _mixture(f, experts, _attention(f, **windows), norms=Norms(bias=True), head_bias=head_bias)


def _olmoe(f: Fields) -> ModelShape:
    return _mixture(f, _experts(f, "num_experts", "intermediate_size"), _attention(f, qk_norm="all"))


def _minimax_m2(f: Fields) -> ModelShape:
    f.count("head_dim")
    experts = _experts(f, "num_local_experts", "intermediate_size")
    return _mixture(f, experts, _attention(f, False, False, qk_norm="all"))


def _qwen2_moe(f: Fields) -> ModelShape:
    windows = _window(
        f, lambda i: f.flag("use_sliding_window") and i % 2 == 0 and i < f.count("max_window_layers")
    )
    shared = f.count("shared_expert_intermediate_size")
    experts = _experts(
        f, "num_experts", "moe_intermediate_size", _sparse(f), shared_width=shared, shared_gate=True
    )
    return _mixture(f, experts, _attention(f, f.flag("qkv_bias", True), False, **windows))


def _qwen3_moe(f: Fields) -> ModelShape:
    windows = _window(f, lambda _: f.flag("use_sliding_window"))
    experts = _experts(f, "num_experts", "moe_intermediate_size", _sparse(f))
    return _mixture(f, experts, _attention(f, qk_norm="head", **windows))


def _gpt_oss(f: Fields) -> ModelShape:
    f.count("head_dim")
    bias, windows = f.flag("attention_bias", True), _window(f, lambda i: i % 2 == 0)
    experts = _experts(f, "num_local_experts", "intermediate_size", bias=True, router_bias=True)
    return _mixture(f, experts, _attention(f, bias, bias, sinks=True, **windows))


def _after_dense(f: Fields) -> Experts:
    """DeepSeek's: experts from `first_k_dense_replace` on, shared ones of the same width beside them."""
    first, every = f.count("first_k_dense_replace", least=0), f.count("moe_layer_freq", default=1)
    width = f.count("moe_intermediate_size")
    shared = f.count("n_shared_experts", least=0, default=0) * width
    where: Callable[[int], bool] = lambda i: i >= first and i % every == 0  # noqa: E731
    return _experts(f, "n_routed_experts", "moe_intermediate_size", where, shared_width=shared)


def _mtp(f: Fields) -> int:
    """Multi-token-prediction modules, by the checkpoint's name of the field or transformers'."""
    return f.count("num_nextn_predict_layers", least=0, default=f.count("num_mtp_layers", least=0, default=0))


def _deepseek(f: Fields) -> ModelShape:
    heads, rope = f.count("num_attention_heads"), f.count("qk_rope_head_dim")
    nope, bias = f.count("qk_nope_head_dim"), f.flag("attention_bias")
    if "q_lora_rank" not in f.config:
        f.fail("q_lora_rank", "missing; null where queries have no low rank")
    latent = Latent(f.given("q_lora_rank"), f.count("kv_lora_rank"), rope, nope, f.count("v_head_dim"))
    attention = Attention(heads, heads, nope + rope, latent, qkv_bias=bias, out_bias=bias)
    return _mixture(f, _after_dense(f), attention, mtp=_mtp(f))


def _glm4_moe(f: Fields) -> ModelShape:
    qk_norm = "head" if f.flag("use_qk_norm") else "none"
    attention = _attention(f, out_bias=False, qk_norm=qk_norm)
    return _mixture(f, _after_dense(f), attention, mtp=_mtp(f))


def _ernie(f: Fields) -> ModelShape:
    bias, last = f.flag("use_bias"), f.count("num_hidden_layers") - 1
    start, end = (
        f.count("moe_layer_start_index", least=0),
        f.count("moe_layer_end_index", least=-1, default=-1),
    )
    every = f.count("moe_layer_interval", default=1)
    width = f.count("moe_intermediate_size")
    shared = f.count("moe_num_shared_experts", least=0, default=0) * width
    experts = _experts(
        f, "moe_num_experts", "moe_intermediate_size",
        lambda i: start <= i <= (last if end == -1 else end) and (i + 1) % every == 0,
        top_k="moe_k", shared_width=shared, shared_bias=bias, router_bias=True,
    )  # fmt: skip
    tied = f.flag("tie_word_embeddings", True)
    dense = DenseFeedForward(f.count("intermediate_size"), bias=bias) if len(experts.layers) <= last else None
    return _shape(f, _attention(f, bias, bias), experts=experts, dense=dense, tied=tied, head_bias=bias)


def _hunyuan(f: Fields) -> ModelShape:
    width = f.count("intermediate_size")
    experts = _experts(f, "num_experts", "intermediate_size", top_k="moe_topk", shared_width=width)
    return _mixture(f, experts, _attention(f, qk_norm="head"))


def _llama4(f: Fields) -> ModelShape:
    layers, every = f.count("num_hidden_layers"), f.count("no_rope_layer_interval", default=4)
    chunks = f.given("attention_chunk_size") is not None
    windows = _window(f, lambda i: chunks and (i + 1) % every != 0, "attention_chunk_size")
    listed, step = f.indices("moe_layers", layers), f.count("interleave_moe_layer_step", default=1)
    experts = _experts(
        f, "num_local_experts", "intermediate_size",
        lambda i: (i + 1) % step == 0 if listed is None else i in listed,
        shared_width=f.count("intermediate_size"),
    )  # fmt: skip
    dense = DenseFeedForward(f.count("intermediate_size_mlp")) if len(experts.layers) < layers else None
    return _shape(f, _attention(f, chunked=True, **windows), experts=experts, dense=dense)


FAMILIES: dict[str, Family] = {
    "deepseek_v2": _deepseek, "deepseek_v3": _deepseek, "ernie4_5_moe": _ernie, "gemma2": _gemma2,
    "gemma3_text": _gemma3, "glm4_moe": _glm4_moe, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "gpt_oss": _gpt_oss,
    "granite": _llama, "granitemoe": _granitemoe, "hunyuan_v1_moe": _hunyuan, "kimi_k2": _deepseek,
    "llama": _llama, "llama4_text": _llama4, "minimax_m2": _minimax_m2, "mistral": _mistral, "mixtral": _mixtral,
    "olmoe": _olmoe, "phimoe": _phimoe, "qwen2": _qwen2, "qwen2_moe": _qwen2_moe, "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}  # fmt: skip
# Models of text and images: their config holds the language model's under `text_config`, which alone is read.
WITH_TEXT_PART = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
