"""Eviction while decoding, against transformers' attention with masks that hide what has left.

Shape suffixes: T tokens of a chain, P pages of it.
"""

import heapq
import inspect

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.eviction import LEAST
from anabranch.scheduling.pages import PAGE
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings

LIMITS = Limits(slots=4, chunk=64, tokens=512)
TEXT = inspect.getsource(heapq).encode()


def toy(layers: int, kv_heads: int):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model():
    return toy(layers=2, kv_heads=2)


def engine(model, **settings) -> Engine:
    settings = {"kv_memory_mib": 4, "limits": LIMITS, **settings}
    return Engine(model, EngineSettings(step="native", threads=1, **settings))


def attention_by_page(model, tokens: list[int]) -> Tensor:
    """Of each token on each page, summed over layers and heads: (T, P)."""
    with torch.no_grad():
        attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
    sums_TT = sum(layer[0].sum(0) for layer in attentions)
    padded = torch.nn.functional.pad(sums_TT, (0, -len(tokens) % PAGE))
    return padded.unflatten(1, (-1, PAGE)).sum(-1)


def test_mass_is_the_attention_of_transformers_by_page(model):
    prompt = tuple(TEXT[:150])
    with engine(model, evict_above=LEAST) as served:
        (chain,) = served.submit(Request(prompt, 20))
        seen = []
        served.watchers.append(lambda parts, outputs: seen.append((parts[0].tokens, outputs.mass_TP.copy())))
        while chain.end is None and chain.new_tokens < 10:
            served.advance()
        expected_TP = attention_by_page(model, chain.tokens)
    at = 0
    for count, mass_TP in seen:
        if at + count > LEAST:
            break  # pages have left
        wide = min(mass_TP.shape[1], expected_TP.shape[1])
        torch.testing.assert_close(
            torch.from_numpy(mass_TP[:, :wide]), expected_TP[at : at + count, :wide], rtol=1e-4, atol=1e-4
        )
        at += count
    assert at >= 128


class Follower:
    """Which tokens of a lone chain each of its rows has seen, told step by step."""

    def __init__(self, served: Engine) -> None:
        self.held: list[int] = []
        self.seen: list[list[int]] = []
        self._evict = served.scheduler.evict
        served.scheduler.evict = self.evict
        served.watchers.append(self.watch)

    def watch(self, parts, outputs) -> None:
        ((chain, count, *_),) = parts
        assert len(self.held) == chain.held
        for token in range(chain.cached, chain.cached + count):
            self.held.append(token)
            self.seen.append(list(self.held))

    def evict(self, chain, places) -> None:
        for place in reversed(places):
            del self.held[place * PAGE : (place + 1) * PAGE]
        self._evict(chain, places)

    def mask(self) -> Tensor:
        """Added to the scores: (1, 1, T, T)."""
        hidden_TT = torch.full((len(self.seen), len(self.seen)), -torch.inf)
        for row, tokens in enumerate(self.seen):
            hidden_TT[row, tokens] = 0.0
        return hidden_TT[None, None]


def test_logprobs_are_those_of_attention_to_what_has_stayed(model):
    with engine(model, evict_above=LEAST) as served:
        follower = Follower(served)
        (completion,) = served.generate([Request(tuple(TEXT[:100]), 250)])
        assert served.scheduler.tally.evicted >= 10 * PAGE
        served.check()
    tokens = [*TEXT[:100], *completion.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), attention_mask=follower.mask()).logits[0, 99:]
    assert logits.argmax(-1).tolist() == completion.tokens
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_chains_stay_within_their_budget_and_end(model, kv_dtype):
    requests = [Request(tuple(TEXT[i * 30 : i * 30 + 200]), 200, samples=2) for i in range(3)]
    with engine(model, evict_above=LEAST, kv_dtype=kv_dtype, spill_mib=8, kv_memory_mib=1) as served:
        chains = [chain for request in requests for chain in served.submit(request)]
        while any(chain.end is None for chain in chains):
            served.advance()
            served.check()
            decoding = [c for c in served.scheduler.running if c.new_tokens > 1]
            assert all(chain.held < LEAST and chain.cached > chain.held for chain in decoding)
    assert all(chain.new_tokens == 200 for chain in chains)


def test_preempted_and_kept_chains_go_on_with_what_they_had(model):
    """With a tier an evicted chain's tokens do not depend on preemption."""
    requests = [Request(tuple(TEXT[i * 30 : i * 30 + 140 + i]), 200) for i in range(4)]
    made = []
    for memory, spill in ((8, 0), (1, 8)):
        wide = {"kv_memory_mib": memory, "spill_mib": spill, "limits": Limits(4, 1024, 512)}
        with engine(toy(layers=4, kv_heads=4), evict_above=LEAST, **wide) as served:
            made.append([completion.tokens for completion in served.generate(requests)])
            tally = served.scheduler.tally
            assert tally.evicted > 0 and (tally.fetched > 0) == (spill > 0)
    assert made[0] == made[1]


def test_the_torch_step_does_not_weigh_pages(model):
    with pytest.raises(ConfigError, match="evict_above"):
        Engine(model, EngineSettings(step="torch", evict_above=LEAST, kv_memory_mib=1))
    with pytest.raises(ConfigError, match="evict_above"):
        EngineSettings(evict_above=LEAST - 1)
