"""Rollouts: tokens, log-probabilities and routing are those of the model in training."""

import pytest
import torch
from tests.integrations.toy_models import micro_batch, toy_config
from transformers import AutoModelForCausalLM

from anabranch.errors import ConfigError
from anabranch.integrations.routers import experts_modules, replay
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import EngineSettings
from anabranch.serving.rollout import RolloutEngine

# Few slots and pages: chains are preempted, share prompts, and enter them in chunks.
LIMITS = Limits(slots=3, chunk=16, tokens=128)


def toy(family="qwen3_moe"):
    torch.manual_seed(0)
    config = toy_config(family, 8)
    config.head_dim = 16
    return AutoModelForCausalLM.from_config(config).train()


def settings(step):
    return EngineSettings(step=step, kv_memory_mib=1, threads=1, limits=LIMITS)


def requests():
    text = micro_batch(3, 9)[0].tolist()
    return [
        Request(tuple(text[:n]), 12, samples=2, sampling=Sampling(temperature=1.0, seed=n))
        for n in (5, 37, 48)
    ]


def update_forward(model, rollout):
    """The trainer's forward of one sample: log-probabilities of its answer, and the routing the experts saw."""
    seen = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[1])) for m in experts_modules(model)
    ]
    ids = torch.tensor([[*rollout.prompt, *rollout.tokens[:-1]]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt) - 1 :]
    for hook in hooks:
        hook.remove()
    answer = torch.tensor(rollout.tokens)
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].detach(), torch.stack(seen)


@pytest.mark.parametrize("step", ["native", "torch"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_rollout_tells_what_the_update_will_see(family, step) -> None:
    model = toy(family)
    with RolloutEngine(model, settings(step)) as engine:
        first = engine.generate(requests())
        again = engine.generate(requests())  # its prompts' pages are shared with the first
        assert engine.engine.scheduler.tally.reused > 0
        engine.engine.check()
    assert model.training
    assert [(r.request, r.sample) for r in first] == [(i, s) for i in range(3) for s in range(2)]
    for rollout, repeated in zip(first, again, strict=True):
        logprobs, routed_LTK = update_forward(model, rollout)
        assert torch.allclose(logprobs, torch.tensor(rollout.logprobs), atol=1e-5)
        told_LTK = torch.from_numpy(rollout.routing_LTK)
        assert told_LTK.dtype == torch.uint8
        assert torch.equal(routed_LTK.sort(-1).values, told_LTK.long().sort(-1).values)
        assert repeated.tokens == rollout.tokens
        assert (repeated.routing_LTK == rollout.routing_LTK).all()


@pytest.mark.parametrize("step", ["native", "torch"])
def test_an_update_is_taken_over(step) -> None:
    model = toy()
    with RolloutEngine(model, settings(step)) as engine:
        before = engine.generate(requests())
        assert engine.refreshed is None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        rollout = before[0]
        with replay(model, torch.from_numpy(rollout.routing_LTK)):
            ids = torch.tensor([[*rollout.prompt, *rollout.tokens[:-1]]])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        after = engine.generate(requests())
        assert engine.refreshed is not None
        assert (engine.refreshed.packed_mib > 0) == (step == "native")
    with RolloutEngine(model, settings(step)) as fresh:
        assert [r.tokens for r in fresh.generate(requests())] == [r.tokens for r in after]
    assert [r.tokens for r in before] != [r.tokens for r in after]


def test_a_refresh_waits_for_running_chains() -> None:
    with RolloutEngine(toy(), settings("torch")) as engine:
        engine.engine.submit(requests()[0])
        with pytest.raises(ConfigError, match="chains still run"):
            engine.refresh()


@pytest.mark.parametrize("step", ["native", "torch"])
def test_a_rollout_after_one_that_failed_has_its_own_routing(step) -> None:
    with RolloutEngine(toy(), settings(step)) as engine:
        alone = engine.generate(requests()[:1])
        with pytest.raises(ConfigError, match="vocabulary"):
            engine.generate([*requests(), Request((10**6,), 4)])
        engine.engine.watchers.append(lambda *_: 1 / 0)  # a step that fails once it has computed
        with pytest.raises(ZeroDivisionError):
            engine.generate(requests())
        engine.engine.watchers.pop()
        again = engine.generate(requests()[:1])
    assert [(r.tokens, r.routing_LTK.tolist()) for r in again] == [
        (r.tokens, r.routing_LTK.tolist()) for r in alone
    ]
