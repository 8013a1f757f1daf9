"""What a model of sums is worth: how many problems its samples solve, and at what cost."""

import time
from typing import Any

import torch
from recipes.arithmetic import EOS, MAX_NEW_TOKENS, Problem, answer, problems, solved
from transformers import PreTrainedModel

from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.scheduling.voting import Ballot
from anabranch.serving.engine import EngineSettings
from anabranch.serving.invariant import BatchInvariant
from anabranch.serving.rollout import Rollout, RolloutEngine
from anabranch.telemetry.energy import open_meter
from anabranch.telemetry.energy.estimate import EstimateMeter
from anabranch.training.grpo import pad, spread, token_logprobs

# Seeds of problems: ranges that no stage shares.
JUDGED, PRACTISED, WORKED = 0, 1_000_000, 10_000_000


def settings(step: str) -> EngineSettings:
    """Of the engine that samples: "native", or "torch" for batch-invariant mode."""
    return EngineSettings(
        step=step, kv_memory_mib=64, threads=torch.get_num_threads(), limits=Limits(slots=64, tokens=128)
    )


def requests(asked: list[Problem], samples: int, seed: int) -> list[Request]:
    """Samples at temperature 1: the policy itself, which the ratio of probabilities is about."""
    return [
        Request(
            problem.prompt,
            MAX_NEW_TOKENS,
            samples,
            Sampling(temperature=1.0, seed=seed + i),
            frozenset({EOS}),
        )
        for i, problem in enumerate(asked)
    ]


def judge(model: PreTrainedModel, count: int, votes: int) -> dict[str, Any]:
    """`votes` samples of each of `count` problems that no stage learns from.

    What a solved problem takes is told thrice: of those that a vote solves, of those that some sample solves, and of a
    right sample. None where there is none, and for joules where no counter measures.
    """
    asked = problems(JUDGED, count)
    with RolloutEngine(model, settings("native")) as engine:
        started, cpu, meter = time.perf_counter(), time.process_time(), open_meter()
        rollouts = engine.generate(requests(asked, votes, JUDGED))
        joules, wall_s, cpu_s = meter.joules(), time.perf_counter() - started, time.process_time() - cpu
    right = [[False] * votes for _ in asked]
    for r in rollouts:
        right[r.request][r.sample] = solved(asked[r.request], answer(r.tokens))
    voted, saved = vote(asked, rollouts, votes)
    tokens = sum(len(r.tokens) for r in rollouts)
    passed, rights = sum(map(any, right)), sum(map(sum, right))
    wins = {"problem_by_vote": voted, "problem_by_pass": passed, "right_sample": rights}
    return {
        "pass@1": rights / len(rollouts),
        f"pass@{votes}": passed / len(asked),
        f"vote@{votes}": voted / len(asked),
        "tokens_per_sample": tokens / len(rollouts),
        **{f"tokens_per_{name}": tokens / won if won else None for name, won in wins.items()},
        **{f"ms_per_{name}": 1e3 * wall_s / won if won else None for name, won in wins.items()},
        "tokens_saved_if_sampled_in_turn": saved / tokens,
        "cpu_ms_per_token": 1e3 * cpu_s / tokens,
        "joules_per_token": joules / tokens if meter.source != EstimateMeter.source else None,
        **mismatch(model, min(count, 32)),
    }  # fmt: skip


def vote(asked: list[Problem], rollouts: list[Rollout], votes: int) -> tuple[int, int]:
    """Problems whose most frequent answer is right, and tokens of samples that would not have begun, had each problem's
    been drawn one after the other and no further than its vote was open. (Drawn at once, as here, none is saved.)"""
    ballots, saved = [Ballot(votes) for _ in asked], 0
    for r in sorted(rollouts, key=lambda r: (r.request, r.sample)):
        ballot = ballots[r.request]
        if ballot.decided:
            saved += len(r.tokens)
        else:
            ballot.cast(r.sample, answer(r.tokens), len(r.tokens))
    return sum(solved(p, b.outcome({}).answer) for p, b in zip(asked, ballots, strict=True)), saved


def mismatch(model: PreTrainedModel, count: int) -> dict[str, float]:
    """The largest difference between log-probabilities of rollouts and of the trainer's forward over them."""
    asked = problems(JUDGED, count)

    def largest(step: str) -> tuple[float, float]:
        with RolloutEngine(model, settings(step)) as engine:
            cpu = time.process_time()
            rollouts = engine.generate(requests(asked, 2, JUDGED))
            cpu = time.process_time() - cpu
        sequences = pad([r.prompt for r in rollouts], [r.tokens for r in rollouts])
        sampled_BT = spread(sequences, [r.logprobs for r in rollouts])
        apart_BT = (token_logprobs(model, sequences) - sampled_BT) * sequences.generated_BT
        return apart_BT.abs().max().item(), 1e3 * cpu / sum(len(r.tokens) for r in rollouts)

    with torch.no_grad():
        fast, _ = largest("native")
        with BatchInvariant():
            exact, cpu_ms = largest("torch")
    return {"mismatch_fast": fast, "mismatch_invariant": exact, "cpu_ms_per_token_invariant": cpu_ms}
