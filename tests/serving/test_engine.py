"""Greedy output is transformers' own, token by token, whatever the step, the batch, the chunks and the memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.toy_decoders import FAMILIES, greedy, prompt, toy_decoder
from transformers import AutoConfig, AutoModelForCausalLM

from anabranch.errors import BuildError, ConfigError
from anabranch.scheduling.chain import End, Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.scheduling.thinking import Thinking
from anabranch.serving.engine import Completion, Engine, EngineSettings
from anabranch.serving.native import library

NEW = 40
# Under a page, over one, over the chunk: all prompts are of other places of the text.
PROMPTS = [prompt(n, 50 * n) for n in (5, 17, 33, 64, 100)]
STEPS = ("native", "torch")


@contextmanager
def engine(family: str, step: str = "native", **settings: Any) -> Iterator[Engine]:
    """Fewer slots than prompts and a chunk smaller than some of them."""
    limits = settings.pop("limits", Limits(slots=4, chunk=24, tokens=512))
    with Engine(toy_decoder(family), EngineSettings(step=step, threads=1, limits=limits, **settings)) as made:
        yield made
        made.check()
        assert made.scheduler.pool.free == made.scheduler.pool.pages - len(made.scheduler.prefixes.pages)
        assert not made.logprobs


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [c.tokens for c in completions]


def references(family: str, new: int = NEW) -> list[list[int]]:
    return [greedy(family, p, new) for p in PROMPTS]


# The torch step is transformers' own modules: two families show its pages.
WIDE = [
    (family, step)
    if step == "native" or family in ("qwen3_moe", "llama")
    else pytest.param(family, step, marks=pytest.mark.full)
    for family in FAMILIES
    for step in STEPS
]


@pytest.mark.parametrize(("family", "step"), WIDE)
def test_greedy_output_is_that_of_transformers(family: str, step: str) -> None:
    with engine(family, step) as made:
        assert made.step.name == step
        assert tokens_of(made.generate([Request(p, NEW) for p in PROMPTS])) == references(family)


@pytest.mark.parametrize("step", STEPS)
def test_preempted_chains_go_on_as_if_they_had_not_been(step: str) -> None:
    family, new = "qwen3_moe", 50
    with engine(family, step, kv_memory_mib=1) as made:
        # All but a few pages are taken away, since a toy's tokens are small.
        pool = made.scheduler.pool
        taken = [pool.take() for _ in range(pool.pages - 11)]
        done = made.generate([Request(p, new) for p in PROMPTS])
        assert made.scheduler.tally.preempted > 0
        for page in taken:
            pool.give_back(page)
        assert tokens_of(done) == references(family, new)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_transformers_with_everything_at_once(family: str, tmp_path: Path) -> None:
    """Mixed lengths, chunks, shared prompts, preemption with a tier on disk, guesses."""
    made_with = {"kv_memory_mib": 1, "spill_mib": 16, "spill_folder": str(tmp_path), "speculate": 4}
    new, requests = 50, [Request(p, 50, samples=1 + (len(p) == 100)) for p in PROMPTS]
    with engine(family, **made_with) as made:
        pool = made.scheduler.pool
        taken = [pool.take() for _ in range(pool.pages - 14)]
        done = made.generate(requests)
        tally = made.scheduler.tally
        assert min(tally.preempted, tally.fetched, tally.reused, tally.accepted) > 0, tally
        for page in taken:
            pool.give_back(page)
    expected = references(family, new)
    assert tokens_of(done) == [*expected, expected[-1]]


def test_what_a_failing_run_leaves_behind_is_nothing() -> None:
    family = "qwen3_moe"
    fine = [Request(p, NEW) for p in PROMPTS]
    with engine(family) as made:
        with pytest.raises(ConfigError, match="vocabulary"):
            made.generate([*fine, Request((999,), NEW)])
        assert made.scheduler.idle

        def refuse(completion: Completion) -> None:
            raise LookupError(completion.request)

        with pytest.raises(LookupError):
            made.generate(fine, refuse)
        assert made.scheduler.idle
        assert tokens_of(made.generate(fine[:1])) == references(family)[:1]


def test_a_chain_is_no_longer_than_the_positions_of_its_model() -> None:
    with engine("llama", limits=Limits(slots=2, tokens=4096)) as made:
        assert made.limits.tokens == 512
        with pytest.raises(ConfigError, match="512"):
            made.submit(Request(PROMPTS[0], 508))


@pytest.mark.parametrize("step", STEPS)
def test_samples_and_later_requests_share_their_prompt(step: str) -> None:
    family, asked = "mixtral", PROMPTS[4]
    with engine(family, step) as made:
        done = made.generate([Request(asked, NEW, samples=6)])
        assert tokens_of(done) == [greedy(family, asked, NEW)] * 6
        assert made.scheduler.tally.reused == 5 * 99, "all but the last token, of each sample but the first"
        longer = asked + tuple(greedy(family, asked, NEW)[:8])
        assert tokens_of(made.generate([Request(longer, 20)])) == [greedy(family, longer, 20)]
        assert made.scheduler.tally.reused == 5 * 99 + 96, "of another request whole pages"


def test_samples_copy_open_pages_too() -> None:
    """Kept as int8, the end of a prompt is on a page that is not yet."""
    asked = Request(PROMPTS[4], 20, samples=3)
    with engine("qwen3", kv_dtype="int8") as made:
        first, *others = made.generate([asked])
        assert made.scheduler.tally.reused == 2 * 99
        assert all((c.tokens, c.logprobs) == (first.tokens, first.logprobs) for c in others)
        made.check()


def test_a_chain_does_not_depend_on_its_batch() -> None:
    """Bit for bit, in the native step's fp32."""
    request = Request(PROMPTS[2], NEW, samples=2, sampling=Sampling(temperature=0.8, seed=5))
    others = [Request(p, NEW, sampling=Sampling(temperature=1.0, seed=9)) for p in PROMPTS]
    with engine("qwen2_moe", limits=Limits(slots=1, chunk=512, tokens=512)) as made:
        alone = made.generate([request])
    with engine("qwen2_moe", limits=Limits(slots=8, chunk=7, tokens=512)) as made:
        among = made.generate([*others, request])[len(others) :]
    assert [(c.tokens, c.logprobs) for c in among] == [(c.tokens, c.logprobs) for c in alone]


@pytest.mark.parametrize("step", STEPS)
def test_logprobs_are_those_of_the_model(step: str) -> None:
    with engine("olmoe", step) as made:
        done = made.generate([Request(p, 10, sampling=Sampling(temperature=1.5, top_k=20)) for p in PROMPTS])
    for asked, completion in zip(PROMPTS, done, strict=True):
        with torch.no_grad():
            logits_TV = toy_decoder("olmoe")(torch.tensor([[*asked, *completion.tokens]])).logits[0]
        expected_TV = logits_TV.log_softmax(-1)[len(asked) - 1 : -1]
        expected = expected_TV[range(10), completion.tokens].tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("step", STEPS)
def test_a_forced_end_of_thought_is_part_of_the_chain(step: str) -> None:
    family, asked, thinking = "qwen3_moe", PROMPTS[1], Thinking(10, (60, 47), (46, 46))
    forced = [46, 46, 60, 47]
    with engine(family, step) as made:
        (done,) = made.generate([Request(asked, 30, thinking=thinking)])
        (at_once,) = made.generate([Request(asked, 12, thinking=Thinking(0, (60, 47)))])
    before = greedy(family, asked, 10)
    after = greedy(family, (*asked, *before, *forced), 16)
    assert done.tokens == [*before, *forced, *after] and done.end is End.LENGTH
    assert [i for i, logprob in enumerate(done.logprobs) if logprob is None] == [10, 11, 12, 13]
    assert at_once.tokens == [60, 47, *greedy(family, (*asked, 60, 47), 10)]
    assert at_once.logprobs[:2] == [None, None] and None not in at_once.logprobs[2:]


def test_a_chain_ends_at_a_stop_token() -> None:
    whole = greedy("llama", PROMPTS[0], NEW)
    with engine("llama") as made:
        (done,) = made.generate([Request(PROMPTS[0], NEW, stop_tokens=frozenset({whole[7]}))])
    assert done.tokens == whole[: whole.index(whole[7]) + 1] and done.end is End.STOP


def test_a_cancelled_chain_gives_its_pages_back() -> None:
    with engine("llama") as made:
        first, *others = (chain for p in PROMPTS for chain in made.submit(Request(p, NEW)))
        for _ in range(5):
            made.advance()
        for chain in others:
            made.cancel(chain)
            assert made.completion(chain).end is End.CANCELLED
        made.check()
        while first.end is None:
            made.advance()
        assert made.completion(first).tokens == greedy("llama", PROMPTS[0], NEW)


def forced_chain(made: Engine, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits of every position of a chain that is fed these tokens one by one after the first 8."""
    rows: list[torch.Tensor] = []
    made.watchers.append(lambda _, outputs: rows.append(outputs.logits_WV.clone()))
    (chain,) = made.submit(Request(tokens[:8], len(tokens) - 8))
    while chain.end is None:
        made.advance()
        chain.tokens[8 : 8 + len(rows)] = tokens[8 : 8 + len(rows)]
    made.completion(chain)
    return torch.cat(rows)


def test_int8_pages_are_close_to_full_ones() -> None:
    """At the end of 200 tokens most of what is attended to is int8. A dense family: no choice of experts flips."""
    with engine("qwen3") as made:
        full = forced_chain(made, prompt(200)).log_softmax(-1)
    with engine("qwen3", kv_dtype="int8") as made:
        small = forced_chain(made, prompt(200)).log_softmax(-1)
        assert made.kv_shape.page_bytes("int8") * 3 < made.kv_shape.page_bytes("float32")
    kl_T = (full.exp() * (full - small)).sum(-1)
    assert torch.equal(full[:8], small[:8]), "the first page is not full yet"
    assert 0 < kl_T.max() < 1e-3, kl_T.max()
    with pytest.raises(ConfigError, match="kv_dtype"), engine("qwen3", "torch", kv_dtype="int8"):
        pass


def test_bf16_is_close_to_fp32() -> None:
    with engine("qwen3") as made:
        full = forced_chain(made, prompt(100)).log_softmax(-1)
    with engine("qwen3", dtype="bfloat16") as made:
        small = forced_chain(made, prompt(100)).log_softmax(-1)
    kl_T = (full.exp() * (full - small)).sum(-1)
    assert 0 < kl_T.max() < 1e-3, kl_T.max()


def test_a_sample_that_is_cancelled_meanwhile_is_returned_as_such() -> None:
    with engine("qwen3_moe") as made:
        short, long = Request(PROMPTS[0], 4), Request(PROMPTS[1], 60)

        def each(done: Completion) -> None:
            for chain in made.scheduler.running:
                if chain.request is long:
                    made.cancel(chain)

        first, second = made.generate([short, long], each)
        assert (first.end, second.end) == (End.LENGTH, End.CANCELLED)
        assert len(second.tokens) < 60
        made.check()


def test_a_closed_engine_says_so() -> None:
    with engine("qwen3_moe") as made:
        pass
    with pytest.raises(ConfigError, match="engine is closed"):
        made.generate([Request(PROMPTS[0], 4)])


def test_smallest_temperature_is_greedy() -> None:
    almost = Sampling(temperature=1e-6, top_p=0.9, seed=3)
    with engine("qwen3_moe") as made:
        cold, greedily = made.generate([Request(PROMPTS[1], 20, sampling=almost), Request(PROMPTS[1], 20)])
        assert cold.tokens == greedily.tokens


@pytest.mark.parametrize(
    ("family", "sizes", "why"),
    [
        ("qwen3_next", {}, "linear_attention"),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("deepseek_v3", {}, "latent attention"),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}, "attention sinks"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "attention sinks"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "capped scores"),
    ],
)
def test_models_that_pages_cannot_hold_are_refused(family: str, sizes: dict[str, Any], why: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=2, **sizes))
    with pytest.raises(ConfigError, match=why):
        Engine(model, EngineSettings(threads=1, kv_memory_mib=1))


@pytest.mark.parametrize("step", ["torch", "native"])
def test_a_sliding_window_holds_whole_chains_or_is_refused(step: str) -> None:
    model = copy.deepcopy(toy_decoder("mistral"))
    model.config.sliding_window = 64
    for layer in model.model.layers:  # what a model made of this configuration passes on
        layer.self_attn.config.sliding_window = 64
    with pytest.raises(ConfigError, match="tokens: its layers attend to the last 64"):
        Engine(model, EngineSettings(threads=1, step=step, limits=Limits(tokens=65)))
    with Engine(
        model, EngineSettings(kv_memory_mib=8, threads=1, step=step, limits=Limits(tokens=64))
    ) as made:
        (done,) = made.generate([Request(PROMPTS[0], 20)])
    assert done.tokens == greedy("mistral", PROMPTS[0], 20)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_changes_with_length_is_refused_beyond_it(rope_type: str) -> None:
    half = toy_decoder("qwen3").config.head_dim // 2
    rope = {
        "rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * half, "long_factor": [2.0] * half,
    }  # fmt: skip
    config = copy.deepcopy(toy_decoder("qwen3").config)
    config.rope_parameters = rope if rope_type == "longrope" else {k: rope[k] for k in list(rope)[:4]}
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match="beyond 64 tokens"):
        Engine(model, EngineSettings(threads=1, limits=Limits(tokens=65)))
    with Engine(model, EngineSettings(kv_memory_mib=8, threads=1, limits=Limits(tokens=64))) as made:
        (done,) = made.generate([Request(PROMPTS[0], 20)])
    asked = torch.tensor([PROMPTS[0]])
    whole = model.generate(asked, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert done.tokens == whole[0, len(PROMPTS[0]) :].tolist()


def test_half_precision_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="float16 is not computed"):
        Engine(copy.deepcopy(toy_decoder("qwen3")).to(torch.float16), EngineSettings(threads=1))


def test_mistakes_are_named() -> None:
    for wrong, named in (
        ({"dtype": "float8"}, "dtype"),
        ({"kv_dtype": "float8"}, "kv_dtype"),
        ({"kv_memory_mib": 0}, "kv_memory_mib"),
        ({"threads": 0}, "threads"),
        ({"step": "fast"}, "step"),
    ):
        with pytest.raises(ConfigError, match=f"^{named}: "):
            EngineSettings(**wrong)
    with engine("llama") as made, pytest.raises(ConfigError, match="token 256 is not in a vocabulary of 256"):
        made.submit(Request((1, 256)))
    with engine("llama") as made, pytest.raises(ConfigError, match="end_of_thought: token 300 is not in"):
        made.submit(Request((1,), thinking=Thinking(4, (300,))))


def test_without_a_compiler_the_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    library.library.cache_clear()
    try:
        with engine("llama", "auto") as made:
            assert made.step.name == "torch" and "no C++ compiler" in str(made.why_not_native)
            assert tokens_of(made.generate([Request(PROMPTS[0], 5)])) == [
                greedy("llama", PROMPTS[0], NEW)[:5]
            ]
        with pytest.raises(BuildError, match="install g"), engine("llama", "native"):
            pass
        for asked in ({"dtype": "int8"}, {"kv_dtype": "int8"}, {"evict_above": 256}):
            with pytest.raises(ConfigError, match="no C\\+\\+ compiler"), engine("llama", "auto", **asked):
                pass
    finally:
        library.library.cache_clear()
