"""Group relative policy optimisation, on numbers worked out by hand and on a toy model.

Shape suffixes: Q prompts, N samples, B sequences, T tokens.
"""

import math

import torch
from tests.integrations.toy_models import micro_batch, toy_config
from transformers import AutoModelForCausalLM

from anabranch.training.grpo import advantages, objective, pad, spread, token_logprobs


def test_samples_are_judged_against_their_group() -> None:
    found_QN = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]))
    third = math.sqrt(3) / 3
    torch.testing.assert_close(
        found_QN[0], torch.tensor([3 * third, -third, -third, -third]), rtol=1e-3, atol=0
    )
    assert not found_QN[1].any()
    assert found_QN.sum(1).abs().max() < 1e-5


def test_chains_are_padded_and_their_generated_tokens_marked() -> None:
    sequences = pad([[5, 6], [7]], [[8], [9, 10, 11]])
    assert sequences.token_BT.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert sequences.mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert sequences.generated_BT.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert spread(sequences, [[-1.0], [-2.0, -3.0, -4.0]]).tolist() == [[0, 0, -1, 0], [0, -2, -3, -4]]


def test_a_ratio_is_cut_only_where_it_has_gone_too_far_its_way() -> None:
    generated_BT = torch.tensor([[False, True, True], [False, True, True]])
    ratio_BT = torch.tensor([[9.0, 1.5, 0.5], [9.0, 1.5, 0.5]])
    logprob_BT = ratio_BT.log().requires_grad_()
    got = objective(logprob_BT, torch.zeros(2, 3), torch.tensor([1.0, -2.0]), generated_BT, 0.2, tokens=10)
    # Gains: min(1.5, 1.2), min(0.5, 0.8), min(-3, -2.4), min(-1, -1.6).
    assert math.isclose(got.loss.item(), -(1.2 + 0.5 - 3.0 - 1.6) / 10, rel_tol=1e-6)
    assert got.clipped == 0.5
    got.loss.backward()
    assert logprob_BT.grad is not None
    torch.testing.assert_close(logprob_BT.grad * 10, torch.tensor([[0.0, 0.0, -0.5], [0.0, 3.0, 0.0]]))


def test_a_step_makes_what_was_rewarded_more_probable() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(toy_config("qwen3_moe", 8))
    text = micro_batch(0, 0)[0].tolist()
    sequences = pad([text[:6]] * 4, [text[6:12], text[20:23], text[30:34], text[25:30]])
    advantage_B = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before_BT = token_logprobs(model, sequences)
    assert not before_BT[sequences.mask_BT == 0].any()
    got = objective(before_BT, before_BT.detach(), advantage_B, sequences.generated_BT, 0.2, tokens=18)
    assert (got.clipped, got.distance) == (0.0, 0.0)
    got.loss.backward()
    optimizer.step()
    gained_B = ((token_logprobs(model, sequences) - before_BT) * sequences.generated_BT).sum(1)
    assert gained_B[0] > 0 and gained_B[3] > 0 and gained_B[1] < gained_B[0] and gained_B[2] < gained_B[3]
