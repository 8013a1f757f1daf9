"""Group relative policy optimisation: several samples of a prompt, each judged against its group (Shao et al., 2024,
"DeepSeekMath", arXiv:2402.03300).

Where it departs from the paper: tokens are weighted alike, not by the length of their sample (Liu et al., 2025, "Dr.
GRPO", arXiv:2503.20783, on why), and there is no penalty for leaving a reference model.

Shape suffixes: Q prompts, N samples of each, B sequences, T tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Added to a group's standard deviation.
EPS = 1e-4


class Sequences(NamedTuple):
    """Chains padded on the right. All (B, T): tokens, 1 where there is one, and whether the token was generated."""

    token_BT: Tensor
    mask_BT: Tensor
    generated_BT: Tensor


class Objective(NamedTuple):
    """loss: to minimise. clipped: fraction of generated tokens whose ratio was cut. distance: mean of the estimate
    r - 1 - log r of the divergence to the policy that sampled (Schulman, 2020)."""

    loss: Tensor
    clipped: float
    distance: float


def pad(prompts: Sequence[Sequence[int]], samples: Sequence[Sequence[int]]) -> Sequences:
    """Each prompt followed by its sample, as one batch. Prompt i belongs to sample i."""
    chains = [[*prompt, *sample] for prompt, sample in zip(prompts, samples, strict=True)]
    shape = len(chains), max(len(chain) for chain in chains)
    token_BT = torch.zeros(shape, dtype=torch.int64)
    mask_BT, generated_BT = torch.zeros_like(token_BT), torch.zeros(shape, dtype=torch.bool)
    for i, (prompt, chain) in enumerate(zip(prompts, chains, strict=True)):
        token_BT[i, : len(chain)] = torch.tensor(chain)
        mask_BT[i, : len(chain)] = 1
        generated_BT[i, len(prompt) : len(chain)] = True
    return Sequences(token_BT, mask_BT, generated_BT)


def token_logprobs(model: nn.Module, sequences: Sequences) -> Tensor:
    """fp32 (B, T): log-probability of each token after those before it; 0 for the first and for padding."""
    token_BT, mask_BT, _ = sequences
    out: Any = model(input_ids=token_BT, attention_mask=mask_BT, use_cache=False)
    logits_BTV = out.logits[:, :-1].float()
    chosen_BT = logits_BTV.gather(-1, token_BT[:, 1:, None]).squeeze(-1) - logits_BTV.logsumexp(-1)
    return nn.functional.pad(chosen_BT * mask_BT[:, 1:], (1, 0))


def spread(sequences: Sequences, values: Sequence[Sequence[float]]) -> Tensor:
    """fp32 (B, T): values of the generated tokens, such as the log-probabilities a rollout gave; 0 elsewhere."""
    out_BT = torch.zeros(sequences.token_BT.shape)
    out_BT[sequences.generated_BT] = torch.tensor(
        [v for sample in values for v in sample], dtype=torch.float32
    )
    return out_BT


def advantages(reward_QN: Tensor) -> Tensor:
    """Rewards less their group's mean, over its standard deviation. A group of equal rewards gets zeros."""
    mean_Q1 = reward_QN.mean(1, keepdim=True)
    return (reward_QN - mean_Q1) / (reward_QN.std(1, correction=0, keepdim=True) + EPS)


def objective(
    logprob_BT: Tensor,
    sampled_BT: Tensor,
    advantage_B: Tensor,
    generated_BT: Tensor,
    clip: float,
    tokens: int,
) -> Objective:
    """The clipped surrogate of PPO. sampled_BT: log-probabilities when the chains were sampled.

    clip: how far the ratio of probabilities may leave 1 to a token's advantage. tokens: what the sum over generated
    tokens is divided by; the same for all micro-batches of an update.
    """
    log_ratio_BT = (logprob_BT - sampled_BT)[generated_BT]
    ratio = log_ratio_BT.exp()
    advantage = advantage_B[:, None].expand_as(generated_BT)[generated_BT]
    cut = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage, cut * advantage)
    with torch.no_grad():
        clipped = (gain != ratio * advantage).float().mean()
        distance = (ratio - 1 - log_ratio_BT).mean()
    return Objective(-gain.sum() / tokens, float(clipped), float(distance))
