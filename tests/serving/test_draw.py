"""Drawing a token in C++ beside its torch twin, and both beside numpy's own arithmetic."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anabranch.scheduling.sampling import Sampling
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.step.draw import Draw, draw_by_torch
from anabranch.training.presets import presets

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=20),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=0.9, top_k=300, top_p=0.8, min_p=0.01),
    Sampling(temperature=1.0, top_p=0.99, repetition_penalty=1.3),
    Sampling(temperature=0.0, repetition_penalty=1.5),
]


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(presets()["tiny"].config)
    with Engine(model, EngineSettings(step="native", threads=2, kv_memory_mib=8)) as opened:
        yield opened


def logits_of(rows: int, vocab: int, spread: float) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * spread


def kept_of(logits_V: Tensor, draw: Draw) -> np.ndarray:
    """Probabilities after all settings, in double precision and in the order of tokens; written anew."""
    sampling, logits = draw.sampling, logits_V.double().numpy().copy()
    for token in draw.seen:
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    p = np.exp((logits - logits.max()) / sampling.temperature)
    if sampling.top_k:
        p[p < np.sort(p)[-sampling.top_k]] = 0
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p * p.sum()]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_native_draws_what_torch_draws(engine, sampling: Sampling, spread: float) -> None:
    rows, vocab = 64, engine.step.vocab
    logits_WV = logits_of(rows, vocab, spread)
    seen = (3, 5, 8, 1000) if sampling.repetition_penalty != 1.0 else ()
    draws = [Draw(row, sampling, (row + 0.5) / rows, seen) for row in range(rows)]
    native, twin = engine.step.draw(logits_WV, draws), draw_by_torch(logits_WV, draws)
    # Where the random number falls within rounding of a border they may differ by one token.
    assert sum(a != b for a, b in zip(native, twin, strict=True)) <= 1
    if not sampling.greedy:
        assert all(kept_of(logits_WV[d.row], d)[t] > 0 for d, t in zip(draws, native, strict=True))


@pytest.mark.parametrize("sampling", [s for s in SETTINGS if not s.greedy], ids=str)
def test_frequencies_are_the_probabilities(engine, sampling: Sampling) -> None:
    """Random numbers evenly over [0, 1): each token comes as often as its probability says, to one draw."""
    logits_WV = logits_of(1, engine.step.vocab, 3.0)
    seen = (3, 5, 8) if sampling.repetition_penalty != 1.0 else ()
    n = 4000
    draws = [Draw(0, sampling, (i + 0.5) / n, seen) for i in range(n)]
    counts = np.bincount(engine.step.draw(logits_WV, draws), minlength=engine.step.vocab)
    p = kept_of(logits_WV[0], draws[0])
    assert np.abs(counts - n * p).max() <= 2.0
    assert counts[p == 0].sum() <= 1
