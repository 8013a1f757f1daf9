"""A tiny MoE learns sums from worked solutions, then improves by GRPO on its own samples. One command, on a CPU:

    python -m recipes.reasoning_grpo                  # the whole run: figures in runs/reasoning/report.json
    python -m recipes.reasoning_grpo --quick          # the same in small, a smoke test
    python -m recipes.reasoning_grpo --resume         # go on after Ctrl-C from the last checkpoint

runs/reasoning/pretrained and runs/reasoning/grpo are folders that `Engine` and transformers load.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from recipes.arithmetic import (
    MAX_NEW_TOKENS,
    answer,
    model_config,
    problems,
    solution,
    solved,
    tokenizer,
    unseen,
)
from recipes.judging import JUDGED, PRACTISED, WORKED, judge, requests, settings
from recipes.stages import descend, interruptible, machine, stage
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from anabranch.placement.base import Homes, max_over_mean
from anabranch.placement.policy import make_planner
from anabranch.serving.rollout import Rollout, RolloutEngine
from anabranch.training.grpo import advantages, objective, pad, spread, token_logprobs

# Seeds of one run are so far from the next one's; those that are judged are the same in all.
APART = 100_000_000
TWO_RANKS_S = 1200


@dataclass(frozen=True)
class Sizes:
    """What a run does. A batch of worked solutions or a round of samples is one step of its stage."""

    pretrain_steps: int = 320
    pretrain_batch: int = 128
    pretrain_lr: float = 3e-3
    grpo_steps: int = 150
    # Each step: problems and samples of each, learnt from in so many optimizer steps.
    prompts: int = 64
    samples: int = 8
    parts: int = 2
    # Adam moves every weight by about this much, whatever the noise: 3e-4 unlearns more than it learns.
    grpo_lr: float = 7e-5
    clip: float = 0.2
    # Judged before and after: problems, and samples of each.
    judged: int = 256
    votes: int = 8
    # Of the first weights, the problems learnt from, and their samples.
    seed: int = 0


QUICK = Sizes(pretrain_steps=120, pretrain_batch=64, grpo_steps=6, prompts=8, judged=32)


def pretrain(folder: Path, model: PreTrainedModel, sizes: Sizes, resume: bool) -> list[dict[str, float]]:
    """Worked solutions of problems that are not judged."""
    judged, first = problems(JUDGED, sizes.judged), WORKED + sizes.seed * APART

    def step(number: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        worked = unseen(problems(first + number * sizes.pretrain_batch, sizes.pretrain_batch), judged)
        sequences = pad([p.prompt for p in worked], [solution(p) for p in worked])
        loss = -token_logprobs(model, sequences)[sequences.generated_BT].mean()
        loss.backward()
        descend(model, optimizer)
        return {"loss": loss.item()}

    return stage(folder, model, tokenizer(), sizes.pretrain_steps, sizes.pretrain_lr, resume, step)


def improve(folder: Path, model: PreTrainedModel, sizes: Sizes, resume: bool) -> list[dict[str, float]]:
    """GRPO: one point for an answer that the verifier takes, none otherwise. Samples come from the native step, whose
    log-probabilities differ from the trainer's by rounding; `mismatch` measures it."""
    judged, first = problems(JUDGED, sizes.judged), PRACTISED + sizes.seed * APART

    def step(number: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        seed = first + number * sizes.prompts
        asked = unseen(problems(seed, sizes.prompts), judged)
        started = time.perf_counter()
        rollouts = engine.generate(requests(asked, sizes.samples, seed))
        sampled = time.perf_counter()
        right = [float(solved(asked[r.request], answer(r.tokens))) for r in rollouts]
        advantage_B = advantages(torch.tensor(right).view(-1, sizes.samples)).flatten()
        verified = time.perf_counter()
        clipped = update(model, optimizer, rollouts, advantage_B, sizes)
        updated = time.perf_counter()
        useful = [r for r, advantage in zip(rollouts, advantage_B.tolist(), strict=True) if advantage]
        return {
            "solved": sum(right) / len(right),
            "clipped": clipped,
            "rollout_s": sampled - started,
            "verify_s": verified - sampled,
            "update_s": updated - verified,
            "tokens": sum(len(r.tokens) for r in rollouts),
            **rank_loads(useful or rollouts),
        }

    with RolloutEngine(model, settings("native")) as engine:
        return stage(folder, model, tokenizer(), sizes.grpo_steps, sizes.grpo_lr, resume, step)


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    advantage_B: torch.Tensor,
    sizes: Sizes,
) -> float:
    """Optimizer steps on parts of the samples. Those of groups that all succeeded or all failed teach nothing and are
    left out. Returns the fraction of tokens whose ratio was clipped."""
    useful = advantage_B.nonzero().flatten().tolist()
    clipped = []
    for part in range(sizes.parts):
        mine = useful[part :: sizes.parts]
        if not mine:
            continue
        sequences = pad([rollouts[i].prompt for i in mine], [rollouts[i].tokens for i in mine])
        sampled_BT = spread(sequences, [rollouts[i].logprobs for i in mine])
        got = objective(
            token_logprobs(model, sequences), sampled_BT, advantage_B[mine], sequences.generated_BT, sizes.clip,
            tokens=len(rollouts) // sizes.parts * MAX_NEW_TOKENS // 2,
        )  # fmt: skip
        got.loss.backward()
        descend(model, optimizer)
        clipped.append(got.clipped)
    return sum(clipped) / max(len(clipped), 1)


def rank_loads(rollouts: list[Rollout]) -> dict[str, float]:
    """Rows of the fuller of two ranks over the mean, averaged over layers, in an update on these samples: experts at
    home, and as planned from the recorded routing before the update runs. Rank r would take every second sample."""
    experts = model_config().num_experts
    homes, planner = Homes.contiguous(experts, ranks=2), make_planner("bounded", epsilon=0.05)
    halves = [np.concatenate([r.routing_LTK for r in rollouts[rank::2]], axis=1) for rank in range(2)]
    plans = [
        planner.plan(
            np.stack([np.bincount(half[layer].ravel(), minlength=experts) for half in halves]), homes
        )
        for layer in range(len(halves[0]))
    ]
    return {
        "load_at_home": fmean(max_over_mean(plan.home_rows_R) for plan in plans),
        "load_planned": fmean(max_over_mean(plan.rows_R) for plan in plans),
        "guests": fmean(plan.guests for plan in plans),
    }


def two_ranks(out: Path) -> dict[str, Any]:
    """The update on two ranks, with and without placement by the known routing: see recipes/two_ranks.py."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = out / "two_ranks.json"
    command = [*launch, "-m", "recipes.two_ranks", str(out / "grpo"), str(told)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=TWO_RANKS_S)
    return json.loads(told.read_text())


def show(report: dict[str, Any]) -> None:
    table = Table(title="Before and after GRPO")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, before in report["before"].items():
        both = (before, report["after"][name])
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in both))
    Console().print(table)
    ranks = report["two_ranks"]
    for way, ms in ranks["update_ms"].items():
        took = f"update {ms:.1f} ms, {ranks['ms_per_solved'][way]:.1f} ms a solved problem"
        Console().print(f"Two ranks, {way.replace('_', ' ')}: {took}")


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and of report.json.")] = Path(
        "runs/reasoning"
    ),
    quick: Annotated[bool, typer.Option(help="A smoke test: the same in small.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, problems and samples.")] = 0,
) -> None:
    """Pretrain a tiny MoE on worked sums, improve it by GRPO, and report both."""
    disable_progress_bar()  # of saving; ours are by stage
    started = time.perf_counter()
    # Sums of several threads would be others, and so would all that is learnt from them.
    torch.set_num_threads(1)
    sizes = replace(QUICK if quick else Sizes(), seed=seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config())
    with interruptible(out, resume):
        learnt = pretrain(out / "pretrained", model, sizes, resume)
        before = judge(model, sizes.judged, sizes.votes)
        history = improve(out / "grpo", model, sizes, resume)
        report = {
            "machine": machine(),
            "sizes": asdict(sizes),
            "before": before,
            "after": judge(model, sizes.judged, sizes.votes),
            "pretrain_s": {name: sum(h[name] for h in learnt) for name in ("wall_s", "cpu_s")},
            "pretrain_loss": learnt[-1]["loss"],
            "grpo_s": {name: sum(h[name] for h in history) for name in ("wall_s", "cpu_s")},
            "grpo_step": {name: fmean(h[name] for h in history) for name in history[0]},
            "grpo_solved": [h["solved"] for h in history],
        }
        # Before what follows, which may fail.
        write(out, report)
        report["two_ranks"] = two_ranks(out)
        report["this_run_s"] = time.perf_counter() - started
        write(out, report)
    show(report)


def write(out: Path, report: dict[str, Any]) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
