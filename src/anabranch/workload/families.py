"""Families of Hugging Face models: what each one's config means, as transformers 5.24 builds it.

Where transformers assumes a size that a config leaves out we do not, but for "as many as heads" and "hidden size by
heads". Every family is compared with the instantiated model in tests/workload/test_real_model.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from anabranch.workload.blocks import Attention, DenseFeedForward, Experts, Latent
from anabranch.workload.fields import Fields
from anabranch.workload.shape import RMS_NORMS, ModelShape, Norms

Rule = Callable[[Fields, int], bool]  # whether the layer of an index is of a kind


def _nowhere(f: Fields, layer: int) -> bool:
    return False


def _wherever_set(f: Fields, layer: int) -> bool:
    return f.given("sliding_window") is not None


def _wherever_used(f: Fields, layer: int) -> bool:
    return f.flag("use_sliding_window")


def _late(f: Fields, layer: int) -> bool:
    return f.flag("use_sliding_window") and layer >= f.count("max_window_layers", least=0)


def _early_even(f: Fields, layer: int) -> bool:
    return f.flag("use_sliding_window") and layer % 2 == 0 and layer < f.count("max_window_layers", least=0)


def _even(f: Fields, layer: int) -> bool:
    return layer % 2 == 0


def _but_each_sixth(f: Fields, layer: int) -> bool:
    return (layer + 1) % f.count("sliding_window_pattern", default=6) != 0


def _chunked(f: Fields, layer: int) -> bool:
    every = f.count("no_rope_layer_interval", default=4)
    return f.given("attention_chunk_size") is not None and (layer + 1) % every != 0


@dataclass(frozen=True)
class Family:
    """A decoder whose config has the usual fields, and what its family does differently.

    window: which layers have a window of `window_field`, where no `layer_types` says so. A bias is a constant, or the
    field that switches it, `bias_default` where that is absent. dense_width: the field of the feed-forward in layers
    without experts. own_head_dim: `head_dim` does not follow from the hidden size.
    """

    window: Rule = _nowhere
    window_field: str = "sliding_window"
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    bias_default: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    sinks: bool = False
    own_head_dim: bool = False
    norms: Norms = RMS_NORMS
    tied: bool = False
    dense_width: str = "intermediate_size"
    gated: bool = True
    experts: Callable[[Fields], Experts] | None = None
    attention: Callable[[Fields], Attention] | None = None

    def __call__(self, f: Fields) -> ModelShape:
        layers, experts = f.count("num_hidden_layers"), self.experts(f) if self.experts else None
        dense = None
        if experts is None or len(experts.layers) < layers:
            bias = self._bias(f, self.mlp_bias)
            dense = DenseFeedForward(f.count(self.dense_width), self.gated, bias)
        return ModelShape(
            family=f.text("model_type"),
            vocab=f.count("vocab_size"),
            hidden=f.count("hidden_size"),
            layers=layers,
            attention=self.attention(f) if self.attention else self._grouped(f, layers),
            dense=dense,
            experts=experts,
            norms=self.norms,
            tied=f.flag("tie_word_embeddings", self.tied),
            head_bias=self._bias(f, self.head_bias),
            # The checkpoints' name of the field, or transformers'.
            mtp=f.count("num_nextn_predict_layers", 0, f.count("num_mtp_layers", 0, 0)),
            dropout=f.positive("hidden_dropout", 0.0),
        )

    def _bias(self, f: Fields, rule: bool | str) -> bool:
        return f.flag(rule, self.bias_default) if isinstance(rule, str) else rule

    def _grouped(self, f: Fields, layers: int) -> Attention:
        hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
        kv_heads = f.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            f.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
        head_dim = f.count("head_dim") if self.own_head_dim else f.given("head_dim")
        if head_dim is None and hidden % heads:
            f.fail(
                "num_attention_heads", f"{heads} does not divide hidden_size {hidden}; head_dim is missing"
            )
        windowed = f.windowed(layers)
        if windowed is None:
            windowed = tuple(i for i in range(layers) if self.window(f, i))
        return Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim or hidden // heads,
            qkv_bias=self._bias(f, self.qkv_bias),
            out_bias=self._bias(f, self.out_bias),
            qk_norm=self.qk_norm,
            sinks=self.sinks,
            windowed=windowed,
            window=f.count(self.window_field) if windowed else None,
            chunked=self.window_field == "attention_chunk_size",
        )


def _latent(f: Fields) -> Attention:
    heads, rope = f.count("num_attention_heads"), f.count("qk_rope_head_dim")
    nope, bias = f.count("qk_nope_head_dim"), f.flag("attention_bias")
    if "q_lora_rank" not in f.config:
        f.fail("q_lora_rank", "missing; null where queries have no low rank")
    latent = Latent(f.given("q_lora_rank"), f.count("kv_lora_rank"), rope, nope, f.count("v_head_dim"))
    return Attention(heads, heads, nope + rope, latent, qkv_bias=bias, out_bias=bias)


def _where(f: Fields, rule: Callable[[int], bool]) -> tuple[int, ...]:
    return tuple(i for i in range(f.count("num_hidden_layers")) if rule(i))


def _top_k(f: Fields, count: str, field: str = "num_experts_per_tok") -> tuple[int, int]:
    """Experts of a layer and of a token. transformers (5.24) saves every family's count as `num_local_experts`."""
    if f.given(count) is None and f.given("num_local_experts") is not None:
        count = "num_local_experts"
    experts, top_k = f.count(count), f.count(field)
    if top_k > experts:
        f.fail(field, f"{top_k} experts a token, but {count} is {experts}")
    return experts, top_k


def _everywhere(f: Fields, count: str = "num_local_experts", top_k: str = "num_experts_per_tok") -> Experts:
    return Experts(*_top_k(f, count, top_k), f.count("intermediate_size"), _where(f, lambda _: True))


def _olmoe(f: Fields) -> Experts:
    return _everywhere(f, "num_experts")


def _gpt_oss(f: Fields) -> Experts:
    count, top_k = _top_k(f, "num_local_experts")
    where = _where(f, lambda _: True)
    return Experts(count, top_k, f.count("intermediate_size"), where, bias=True, router_bias=True)


def _hunyuan(f: Fields) -> Experts:
    width, where = f.count("intermediate_size"), _where(f, lambda _: True)
    return Experts(*_top_k(f, "num_experts", "moe_topk"), width, where, shared_width=width)


def _sparse(f: Fields) -> Experts:
    """Qwen's: every `decoder_sparse_step`-th layer has experts, except those of `mlp_only_layers`."""
    step = f.count("decoder_sparse_step", default=1)
    dense = f.indices("mlp_only_layers", f.count("num_hidden_layers")) or ()
    where = _where(f, lambda i: i not in dense and (i + 1) % step == 0)
    shared = f.count("shared_expert_intermediate_size") if f.text("model_type") == "qwen2_moe" else 0
    width = f.count("moe_intermediate_size")
    # Qwen3's configs as transformers 5.24 saves them have the other name.
    count = "num_local_experts" if f.given("num_local_experts") else "num_experts"
    return Experts(*_top_k(f, count), width, where, shared_width=shared, shared_gate=shared > 0)


def _after_dense(f: Fields) -> Experts:
    """DeepSeek's: experts from `first_k_dense_replace` on, shared ones of the same width beside them."""
    first, every = f.count("first_k_dense_replace", least=0), f.count("moe_layer_freq", default=1)
    width = f.count("moe_intermediate_size")
    shared = f.count("n_shared_experts", least=0, default=0) * width
    where = _where(f, lambda i: i >= first and i % every == 0)
    return Experts(*_top_k(f, "n_routed_experts"), width, where, shared_width=shared)


def _ernie(f: Fields) -> Experts:
    first, every = f.count("moe_layer_start_index", least=0), f.count("moe_layer_interval", default=1)
    last = f.count("moe_layer_end_index", least=-1, default=-1)
    last = f.count("num_hidden_layers") - 1 if last == -1 else last
    where = _where(f, lambda i: first <= i <= last and (i + 1) % every == 0)
    width, bias = f.count("moe_intermediate_size"), f.flag("use_bias")
    shared = f.count("moe_num_shared_experts", least=0, default=0) * width
    count, top_k = _top_k(f, "moe_num_experts", "moe_k")
    return Experts(count, top_k, width, where, shared_width=shared, shared_bias=bias, router_bias=True)


def _llama4(f: Fields) -> Experts:
    listed = f.indices("moe_layers", f.count("num_hidden_layers"))
    step, width = f.count("interleave_moe_layer_step", default=1), f.count("intermediate_size")
    where = _where(f, lambda i: (i + 1) % step == 0) if listed is None else listed
    return Experts(*_top_k(f, "num_local_experts"), width, where, shared_width=width)


def _glm4_moe(f: Fields) -> ModelShape:
    qk_norm = "head" if f.flag("use_qk_norm") else "none"
    return Family(out_bias=False, qk_norm=qk_norm, experts=_after_dense)(f)


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


DEEPSEEK = Family(experts=_after_dense, attention=_latent)
FAMILIES: dict[str, Callable[[Fields], ModelShape]] = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "ernie4_5_moe": Family(
        qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", head_bias="use_bias", tied=True, experts=_ernie
    ),
    "gemma2": Family(window=_even, own_head_dim=True, norms=Norms(4), tied=True),
    "gemma3_text": Family(window=_but_each_sixth, own_head_dim=True, norms=Norms(4), tied=True, qk_norm="head"),
    "glm4_moe": _glm4_moe,
    "gpt2": _gpt2,
    "gpt_neox": Family(bias_default=True, mlp_bias=True, gated=False, norms=Norms(bias=True)),
    "gpt_oss": Family(window=_even, own_head_dim=True, bias_default=True, sinks=True, experts=_gpt_oss),
    "granite": Family(mlp_bias="mlp_bias"),
    "granitemoe": Family(experts=_everywhere),
    "hunyuan_v1_moe": Family(qk_norm="head", experts=_hunyuan),
    "kimi_k2": DEEPSEEK,
    "llama": Family(mlp_bias="mlp_bias"),
    "llama4_text": Family(
        window=_chunked, window_field="attention_chunk_size", dense_width="intermediate_size_mlp", experts=_llama4
    ),
    "minimax_m2": Family(qkv_bias=False, out_bias=False, own_head_dim=True, qk_norm="all", experts=_everywhere),
    "mistral": Family(window=_wherever_set, qkv_bias=False, out_bias=False),
    "mixtral": Family(window=_wherever_set, qkv_bias=False, out_bias=False, experts=_everywhere),
    "olmoe": Family(qk_norm="all", experts=_olmoe),
    "phimoe": Family(window=_wherever_set, norms=Norms(bias=True), head_bias="lm_head_bias", experts=_everywhere),
    "qwen2": Family(window=_late, qkv_bias=True, out_bias=False),
    "qwen2_moe": Family(
        window=_early_even, qkv_bias="qkv_bias", out_bias=False, bias_default=True, experts=_sparse
    ),
    "qwen3": Family(window=_late, own_head_dim=True, qk_norm="head"),
    "qwen3_moe": Family(window=_wherever_used, qk_norm="head", experts=_sparse),
}  # fmt: skip
# Models of text and images: their config holds the language model's under `text_config`, which alone is read.
WITH_TEXT_PART = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
