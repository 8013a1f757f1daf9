"""llama.cpp, where `llama_cpp` and `gguf` import: a folder's Qwen3-MoE in its file format, and many chains at once."""

import re
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from anabranch.cli.generate_cases import CHUNK, GenerateCase
from anabranch.errors import AnabranchError, ConfigError
from anabranch.serving.loading import load_config

# Of matrices; norms and routers stay in fp32. Keys and values of the narrower ones are fp16, its own default.
FORMATS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip


def have_llama() -> bool:
    """Whether both packages are there (`pip install llama-cpp-python gguf`; the first is compiled)."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """The model of the folder without its words. Raises ConfigError for another family than Qwen3-MoE."""
    import gguf  # pyright: ignore[reportMissingImports] - optional

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = model.config
    if c.model_type != "qwen3_moe" or not c.norm_topk_prob:
        raise ConfigError(f"{folder} is no Qwen3-MoE as llama.cpp computes it", setting="engine")
    with closing(gguf.GGUFWriter(file, "qwen3moe")) as writer:
        writer.add_tokenizer_model("no_vocab")
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        numbers = {
            "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "vocab_size": c.vocab_size,
            "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size, "key_length": c.head_dim,
            "expert_feed_forward_length": c.moe_intermediate_size, "head_count": c.num_attention_heads,
            "head_count_kv": c.num_key_value_heads, "value_length": c.head_dim, "expert_count": c.num_experts,
            "expert_used_count": c.num_experts_per_tok,
        }  # fmt: skip
        for name, number in numbers.items():
            getattr(writer, f"add_{name}")(number)
        plain, chosen = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[FORMATS[dtype]]
        for name, weights in _tensors(model):
            kind = chosen if weights.ndim > 1 and "gate_inp" not in name else plain
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, weights in model.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        place, rest = (f"blk.{layer[1]}.", layer[2]) if layer else ("", name)
        rest = rest.removesuffix(".weight")
        if rest == "mlp.experts.gate_up_proj":
            for half, part in zip(("gate", "up"), weights.chunk(2, dim=1), strict=True):
                yield f"{place}ffn_{half}_exps.weight", part.contiguous().numpy()
        else:
            yield f"{place}{NAMES[rest]}.weight", weights.numpy()


class LlamaModel:
    """A file, loaded for all cores. Close it."""

    def __init__(self, file: Path, vocab: int, threads: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports] - optional

        self.lib: Any = llama_cpp
        self.vocab, self.threads = vocab, threads
        quietly = self._hush = self.lib.llama_log_callback(lambda *_: None)  # kept, for C calls it
        self.lib.llama_log_set(quietly, None)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(
            str(file).encode(), self.lib.llama_model_default_params()
        )
        if not self.model:
            raise AnabranchError(f"llama.cpp cannot load {file}")

    def close(self) -> None:
        self.lib.llama_model_free(self.model)

    def decode(self, case: GenerateCase, prompts: list[list[int]]) -> Generator[list[int]]:
        """Greedy tokens of all chains, step after step; the first after all prompts are in."""
        lib, length = self.lib, case.prompt_tokens + case.new_tokens + 1
        asked = lib.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max = len(prompts) * (-(-length // 256) * 256), len(prompts)
        asked.n_batch = asked.n_ubatch = CHUNK
        asked.n_threads = asked.n_threads_batch = self.threads
        if case.dtype == "float32":
            asked.type_k = asked.type_v = lib.GGML_TYPE_F32
        # Else every chain looks through the cells of all.
        asked.kv_unified = False
        context = lib.llama_init_from_model(self.model, asked)
        if not context:
            raise AnabranchError(f"llama.cpp has no room for {len(prompts)} chains of {length} tokens")
        batch = lib.llama_batch_init(CHUNK, 0, 1)
        try:
            last: list[int] = []
            for chain, prompt in enumerate(prompts):
                for start in range(0, len(prompt), CHUNK):
                    part = prompt[start : start + CHUNK]
                    rows = [(token, start + i, chain) for i, token in enumerate(part)]
                    best = self._enter(context, batch, rows, 1)
                last += best
            for position in range(case.prompt_tokens, length):
                yield last
                rows = [(token, position, chain) for chain, token in enumerate(last)]
                last = self._enter(context, batch, rows, len(rows))
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)

    def _enter(self, context: Any, batch: Any, rows: list[tuple[int, int, int]], want: int) -> list[int]:
        """One step; the most probable tokens after the last `want` rows."""
        batch.n_tokens = len(rows)
        for i, (token, position, chain) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, chain
            batch.logits[i] = i >= len(rows) - want
        if status := self.lib.llama_decode(context, batch):
            raise AnabranchError(f"llama.cpp ended a step with {status}")
        logits_WV = np.ctypeslib.as_array(self.lib.llama_get_logits(context), (want, self.vocab))
        return logits_WV.argmax(axis=1).tolist()


@contextmanager
def loaded(folder: Path, dtype: str, threads: int) -> Iterator[LlamaModel]:
    """The folder's model in llama.cpp's format, which it maps from a temporary file."""
    with tempfile.TemporaryDirectory(prefix="anabranch-gguf-") as name:
        file = Path(name) / "model.gguf"
        write_gguf(folder, file, dtype)
        with closing(LlamaModel(file, load_config(folder).vocab_size, threads)) as model:
            yield model
