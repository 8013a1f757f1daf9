"""Batch-invariant fp32: rollouts and the trainer's forward give the same bits.

Shape suffixes: B sequences, T tokens, R rows.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.integrations.toy_models import micro_batch, toy_config
from torch import Tensor
from torch.nn import functional as nnf
from transformers import AutoModelForCausalLM, PreTrainedModel

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Completion, Engine, EngineSettings
from anabranch.serving.invariant import BatchInvariant, silu
from anabranch.training.grpo import pad, spread, token_logprobs

SETTINGS = EngineSettings(step="torch", kv_memory_mib=1, limits=Limits(slots=4, chunk=24, tokens=120))
LENGTHS = (3, 17, 33, 56)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["mixtral", "qwen3_moe", "qwen2_moe"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Weights so large that rounding shows; attention by sdpa, as users have it."""
    torch.manual_seed(0)
    config = toy_config(request.param, 8)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made.eval()


def requests() -> list[Request]:
    """Prompts of several lengths, one longer than a chunk, two samples of each."""
    sampling = Sampling(temperature=1.0, seed=3)
    prompts = [tuple(micro_batch(i, 7)[0, :n].tolist()) for i, n in enumerate(LENGTHS)]
    return [Request(prompt, 20 + 8 * i, samples=2, sampling=sampling) for i, prompt in enumerate(prompts)]


def rollout(model: PreTrainedModel) -> list[Completion]:
    with Engine(model, SETTINGS) as engine:
        done = engine.generate(requests())
        engine.check()
        assert engine.scheduler.tally.reused > 0
    return done


def difference(model: PreTrainedModel, done: Sequence[Completion]) -> Tensor:
    asked = requests()
    sequences = pad([asked[c.request].prompt for c in done], [c.tokens for c in done])
    sampled_BT = spread(sequences, [c.logprobs for c in done])
    return (token_logprobs(model, sequences) - sampled_BT)[sequences.generated_BT]


def test_a_rollout_and_the_trainer_agree_to_the_last_bit(model: PreTrainedModel) -> None:
    with BatchInvariant():
        done = rollout(model)
        model.train()
        for chosen in (done, done[2:3], done[5:0:-2]):
            apart = difference(model, chosen)
            assert apart.abs().max().item() == 0.0
            assert apart.requires_grad


def test_padding_on_the_left_changes_no_bit(model: PreTrainedModel) -> None:
    token_BT = micro_batch(0, 2)
    mask_BT = torch.ones_like(token_BT)
    wide_BT, wide_mask_BT = nnf.pad(token_BT, (9, 0)), nnf.pad(mask_BT, (9, 0))
    position_BT = (wide_mask_BT.cumsum(1) - 1).clamp(min=0)
    with BatchInvariant():
        alone = model(input_ids=token_BT, attention_mask=mask_BT).logits
        padded = model(input_ids=wide_BT, attention_mask=wide_mask_BT, position_ids=position_BT).logits
        padded[:, 9:].logsumexp(-1).sum().backward()
    assert torch.equal(padded[:, 9:], alone)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradients_are_torchs(model: PreTrainedModel) -> None:
    done = rollout(model)
    found = []
    for invariant in (True, False):
        model.zero_grad()
        if invariant:
            with BatchInvariant():
                difference(model, done).sum().backward()
        else:
            difference(model, done).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    ours, torchs = found
    assert ours.keys() == torchs.keys()
    assert all("gate_up_proj" not in name or grad.any() for name, grad in ours.items())
    for name, grad in ours.items():
        torch.testing.assert_close(grad, torchs[name], rtol=1e-4, atol=1e-4 * float(torchs[name].abs().max()))


LEFT_ALONE: list[Callable[[Tensor], Tensor]] = [
    lambda x: nnf.softmax(x, -1),
    lambda x: nnf.log_softmax(x, -1),
    lambda x: x.logsumexp(-1, keepdim=True),
    lambda x: x.pow(2).mean(-1, keepdim=True),
    lambda x: torch.rsqrt(x.abs() + 1e-3),
    lambda x: x / x.sum(-1, keepdim=True),
    lambda x: torch.stack([x, 3 * x, 0.7 * x, 0.1 * x], 1).sum(1),
    torch.cos, torch.sin, torch.exp, silu, torch.sigmoid,
]  # fmt: skip


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_what_is_left_alone_is_row_by_row_in_torch(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    for wide in (2, 7, 8, 24, 33, 128, 257, 1000):
        x_RN = 3 * torch.randn(61, wide)
        with BatchInvariant():
            whole = function(x_RN)
            for first, last in ((0, 1), (5, 8), (7, 40), (60, 61)):
                assert torch.equal(function(x_RN[first:last].clone()), whole[first:last]), (wide, first)


def test_what_cannot_be_invariant_is_refused(model: PreTrainedModel) -> None:
    token_BT = micro_batch(0, 0)
    with BatchInvariant(), pytest.raises(ConfigError, match="not batch-invariant"):
        token_BT.float() @ token_BT.float().t()
    with BatchInvariant(), pytest.raises(ConfigError, match="batches of matrices"):
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    model.set_attn_implementation("eager")
    with BatchInvariant(), pytest.raises(ConfigError, match="not batch-invariant"):
        model(input_ids=token_BT)
    model.set_attn_implementation("sdpa")
    with BatchInvariant(), pytest.raises(ConfigError, match="float32 on the CPU"):
        model.bfloat16()(input_ids=token_BT)
    split = torch.tensor([[True, False, True]])
    q = torch.randn(1, 1, 1, 16)
    with BatchInvariant(), pytest.raises(ConfigError, match="not neighbours"):
        nnf.scaled_dot_product_attention(q, q.expand(1, 1, 3, 16), q.expand(1, 1, 3, 16), attn_mask=split)
