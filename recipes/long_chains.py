"""A tiny MoE learns to work through ledgers, up to chains of 4,000 tokens, and is then judged under each way to keep
keys and values: how many problems it still solves, beside what their memory holds. One command, on a CPU:

    python -m recipes.long_chains                  # figures in runs/long_chains/report.json
    python -m recipes.long_chains --quick          # the same in small, a smoke test
    python -m recipes.long_chains --resume         # go on after Ctrl-C from the last checkpoint

runs/long_chains/model is a folder that `Engine` and transformers load.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from recipes.ledger import (
    ACCOUNTS,
    Ledger,
    ledgers,
    model_config,
    sharpen,
    solution,
    solved,
    tokenizer,
    tokens_of,
)
from recipes.stages import descend, interruptible, machine, stage
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from anabranch.cli.bench_kv import Policy
from anabranch.cli.device import device
from anabranch.cli.fail import FAILED
from anabranch.scheduling.chain import Request
from anabranch.scheduling.pages import PAGE
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.kv_figures import Solved, solve_rate
from anabranch.serving.settings import EngineSettings
from anabranch.training.grpo import Sequences, pad, token_logprobs

# A model that solves fewer than this part cannot tell what a policy loses.
BASE = 0.5
# Seeds of problems: ranges that no stage shares.
JUDGED, WORKED = 0, 10_000_000


class Lesson(NamedTuple):
    """So many steps on batches of ledgers of so many accounts, all of the first `numbers`: to look one up is learnt
    sooner where few are to be told apart."""

    steps: int
    accounts: int
    batch: int
    numbers: int = ACCOUNTS


@dataclass(frozen=True)
class Sizes:
    """lessons: one after the other, at falling rates of one schedule. judged: problems, of the last lesson's size."""

    lessons: tuple[Lesson, ...] = (
        Lesson(450, 8, 64, 40), Lesson(350, 8, 64), Lesson(150, 16, 48), Lesson(200, 48, 24), Lesson(200, 120, 10),
        Lesson(200, 444, 3),
    )  # fmt: skip
    lr: float = 1e-3
    judged: int = 200
    slots: int = 64

    @property
    def accounts(self) -> int:
        return self.lessons[-1].accounts


QUICK = Sizes(lessons=(Lesson(60, 16, 16), Lesson(20, 20, 16)), judged=8)


POLICIES = (
    Policy("bf16", "bfloat16"),
    Policy("int8", "int8"),
    Policy("int4", "int4"),
    Policy("1/2 kept, bf16", "bfloat16", 1 / 2),
    Policy("1/2 kept, int8", "int8", 1 / 2),
    Policy("0.48 kept, int8", "int8", 0.48),
    Policy("1/4 kept, int8", "int8", 1 / 4),
)


def train(folder: Path, model: PreTrainedModel, sizes: Sizes, resume: bool) -> list[dict[str, float]]:
    """Worked solutions, each seen once."""
    plan = [lesson for lesson in sizes.lessons for _ in range(lesson.steps)]

    def step(number: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        lesson = plan[number]
        worked = ledgers(WORKED + 1000 * number, lesson.batch, lesson.accounts, lesson.numbers)
        padded = pad([ledger.prompt for ledger in worked], [solution(ledger) for ledger in worked])
        sequences = Sequences(*(part.to(model.device) for part in padded))
        loss = -token_logprobs(model, sequences)[sequences.generated_BT].mean()
        loss.backward()
        descend(model, optimizer)
        return {"loss": loss.item(), "accounts": lesson.accounts}

    return stage(folder, model, tokenizer(), len(plan), sizes.lr, resume, step)


def judge(model: PreTrainedModel, sizes: Sizes, policy: Policy) -> Solved:
    """Greedy samples of problems that training never saw, weights and activations in bf16 under every policy."""
    tokens = tokens_of(sizes.accounts)
    settings = EngineSettings(
        dtype="bfloat16", kv_dtype=policy.kv_dtype, evict_above=policy.above(tokens), kv_memory_mib=512, step="native",
        threads=torch.get_num_threads(), limits=Limits(sizes.slots, tokens=tokens + PAGE),
    )  # fmt: skip
    asked = ledgers(JUDGED, sizes.judged, sizes.accounts)
    return solve_rate(model, settings, [(_request(ledger), partial(solved, ledger)) for ledger in asked])


def _request(ledger: Ledger) -> Request:
    # No chain stops before its length: all policies are asked for the same tokens, whatever the model has learnt.
    return Request(ledger.prompt, len(solution(ledger)))


def row_of(policy: Policy, told: Solved, sizes: Sizes) -> dict[str, Any]:
    return {
        "policy": policy.name,
        "kv_dtype": policy.kv_dtype,
        "share": policy.share,
        # As many as a chain may have: those of a solution, and a page.
        "chain_tokens": tokens_of(sizes.accounts) + PAGE,
        "problems": told.samples,
        "solve_rate": round(told.rate, 4),
        "kv_bytes_per_token": told.kv.bytes_per_token,
        "chains_in_2_gib": told.kv.chains,
        "chains_with_open_pages": told.kv.chains_with_open,
        "open_mib": told.kv.open_mib,
        "evicted": told.evicted,
        "right": list(told.right),
        "tokens_per_s": round(told.tokens_per_s, 1),
    }


def beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside the first, in which keys and values are kept as they are computed: chains held over its chains,
    points of solve rate lost, and of the same problems those that only the one or the other solved."""
    first = rows[0]
    return [
        row
        | {
            "chains_ratio": round(row["chains_in_2_gib"] / first["chains_in_2_gib"], 3),
            "chains_ratio_with_open_pages": round(
                row["chains_with_open_pages"] / first["chains_with_open_pages"], 3
            ),
            "points_lost": round(100 * (first["solve_rate"] - row["solve_rate"]), 2),
            "lost": sum(a and not b for a, b in zip(first["right"], row["right"], strict=True)),
            "won": sum(b and not a for a, b in zip(first["right"], row["right"], strict=True)),
        }
        for row in rows
    ]


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What is not shown: twice the chains, and four times, for at most a point, by a model that solves problems."""
    found = (
        [] if rows[0]["solve_rate"] >= BASE else [f"{rows[0]['solve_rate']:.0%} solved: no judge of anything"]
    )
    for times, evicts in ((2, False), (4, True)):
        if not any(
            row["chains_ratio"] >= times and row["points_lost"] <= 1 and (row["share"] < 1) == evicts
            for row in rows
        ):
            kind = "evicts" if evicts else "keeps all"
            found.append(f"no policy that {kind} holds {times} times the chains for a point at most")
    return found


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    title = (
        f"{first['problems']} problems, chains of {first['chain_tokens']} tokens: solved, and held in 2 GiB"
    )
    table = Table("policy", "solved", "points lost", "chains", "times bf16's", "with open pages", title=title)
    for row in rows:
        table.add_row(
            row["policy"], f"{row['solve_rate']:.1%}", f"{row['points_lost']:.1f}", f"{row['chains_in_2_gib']:,}",
            f"{row['chains_ratio']:.2f}", f"{row['chains_ratio_with_open_pages']:.2f}",
        )  # fmt: skip
    Console().print(table)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the model and of report.json.")] = Path(
        "runs/long_chains"
    ),
    quick: Annotated[bool, typer.Option(help="A smoke test: the same in small.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False,
) -> None:
    """Train a tiny MoE on worked ledgers and judge it under every KV policy."""
    disable_progress_bar()  # of saving; ours is the stage's
    sizes = QUICK if quick else Sizes()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config()).to(device())
    sharpen(model)
    told = out / "report.json"
    with interruptible(out, resume):
        learnt = train(out / "model", model, sizes, resume)
        model.cpu()
        held: list[dict[str, Any]] = json.loads(told.read_text())["rows"] if told.exists() else []
        for policy in POLICIES[len(held) :]:
            held.append(row_of(policy, judge(model, sizes, policy), sizes))
            report = {
                "machine": machine(),
                "sizes": asdict(sizes),
                "loss": learnt[-1]["loss"],
                "train_s": {name: sum(h[name] for h in learnt) for name in ("wall_s", "cpu_s")},
                "rows": beside(held),
            }
            told.write_text(json.dumps(report, indent=1) + "\n")
    rows = json.loads(told.read_text())["rows"]
    show(rows)
    for trouble in verdict(rows):
        Console().print(trouble)
    raise typer.Exit(FAILED if verdict(rows) and not quick else 0)


if __name__ == "__main__":
    typer.run(main)
