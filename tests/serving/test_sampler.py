"""What is drawn follows the model's own distribution after the settings, computed here once more in numpy."""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.serving.toy_decoders import VOCABULARY, prompt, toy_decoder

from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.sampler import uniform

FAMILY, PROMPT = "qwen3_moe", prompt(40)
DRAWS = 3000


@pytest.fixture(scope="module")
def engine():
    settings = EngineSettings(threads=1, kv_memory_mib=4, limits=Limits(slots=64, chunk=64, tokens=128))
    with Engine(toy_decoder(FAMILY), settings) as made:
        yield made


@cache
def logits_V() -> NDArray[np.float64]:
    with torch.no_grad():
        return toy_decoder(FAMILY)(torch.tensor([PROMPT])).logits[0, -1].double().numpy()


def expected(sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities by the definition of each setting, all tokens sorted."""
    scaled_V = logits_V() / sampling.temperature
    p_V = np.exp(scaled_V - scaled_V.max())
    p_V /= p_V.sum()
    order_V = np.argsort(-p_V)
    if sampling.top_k:
        p_V[order_V[sampling.top_k :]] = 0
        p_V /= p_V.sum()
    if sampling.top_p < 1:
        reached = np.searchsorted(np.cumsum(p_V[order_V]), sampling.top_p)
        p_V[order_V[reached + 1 :]] = 0
        p_V /= p_V.sum()
    p_V[p_V < sampling.min_p * p_V.max()] = 0
    return p_V / p_V.sum()


def surprise(counts_V: NDArray[np.int64], p_V: NDArray[np.float64]) -> float:
    """Standard deviations of chi-square above its mean (Wilson and Hilferty, 1931); rare tokens are taken together."""
    order_V = np.argsort(-p_V)
    expected_V, seen_V = p_V[order_V] * counts_V.sum(), counts_V[order_V]
    common = max(int((expected_V >= 8).sum()), 1)
    e_B = np.append(expected_V[:common], expected_V[common:].sum())
    n_B = np.append(seen_V[:common], seen_V[common:].sum())
    e_B, n_B = e_B[e_B > 0], n_B[e_B > 0]
    freedom = len(e_B) - 1
    chi2 = ((n_B - e_B) ** 2 / e_B).sum()
    return float(((chi2 / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom)))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(engine: Engine, settings: dict[str, float]) -> None:
    sampling = Sampling(**settings, seed=11)
    done = engine.generate([Request(PROMPT, 1, samples=DRAWS, sampling=sampling)])
    counts_V = np.bincount([c.tokens[0] for c in done], minlength=VOCABULARY)
    p_V = expected(sampling)
    assert not counts_V[p_V == 0].any(), "a token that was cut came"
    assert abs(surprise(counts_V, p_V)) < 3.5
    skewed_V = np.roll(p_V, 1)
    assert surprise(counts_V, skewed_V + 1e-9) > 10, "another distribution would be noticed"


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [c.tokens for c in engine.generate([Request(PROMPT, 8, samples=4, sampling=sampling)])]

    assert drawn(1) == drawn(1)
    assert len({tuple(tokens) for seed in (1, 2) for tokens in drawn(seed)}) == 8


def test_random_numbers_are_even_and_of_their_own() -> None:
    numbers = np.array([uniform(s, i, t) for s in range(12) for i in range(12) for t in range(100)])
    assert len(set(numbers)) == len(numbers) and ((numbers >= 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert abs(surprise(counts, np.full(64, 1 / 64))) < 3.5
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(engine: Engine, penalty: float) -> None:
    out = toy_decoder(FAMILY).generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=40, do_sample=False,
        repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    (done,) = engine.generate([Request(PROMPT, 40, sampling=Sampling(repetition_penalty=penalty))])
    assert done.tokens == out[0, len(PROMPT) :].tolist()
    (plain,) = engine.generate([Request(PROMPT, 40)])
    assert plain.tokens != done.tokens


def test_one_candidate_is_the_most_probable(engine: Engine) -> None:
    (plain,) = engine.generate([Request(PROMPT, 20)])
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        (done,) = engine.generate([Request(PROMPT, 20, sampling=Sampling(temperature=1.0, **settings))])
        assert done.tokens == plain.tokens
