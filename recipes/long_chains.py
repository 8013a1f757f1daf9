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
from recipes.ledger import Ledger, ledgers, model_config, solution, solved, tokenizer, tokens_of
from recipes.stages import descend, interruptible, machine, stage
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from anabranch.cli.bench_kv import Policy
from anabranch.cli.device import device
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.kv_figures import Solved, solve_rate
from anabranch.serving.settings import EngineSettings
from anabranch.training.grpo import Sequences, pad, token_logprobs

# Seeds of problems: ranges that no stage shares.
JUDGED, WORKED = 0, 10_000_000


class Lesson(NamedTuple):
    """So many steps on batches of ledgers of so many accounts."""

    steps: int
    accounts: int
    batch: int


@dataclass(frozen=True)
class Sizes:
    """lessons: one after the other, at falling rates of one schedule. judged: problems, of the last lesson's size."""

    lessons: tuple[Lesson, ...] = (
        Lesson(1600, 8, 64), Lesson(200, 16, 48), Lesson(250, 48, 24), Lesson(250, 120, 10), Lesson(500, 444, 3)
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
    Policy("1/4 kept, int8", "int8", 1 / 4),
)


def train(folder: Path, model: PreTrainedModel, sizes: Sizes, resume: bool) -> list[dict[str, float]]:
    """Worked solutions, each seen once."""
    plan = [lesson for lesson in sizes.lessons for _ in range(lesson.steps)]

    def step(number: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        lesson = plan[number]
        worked = ledgers(WORKED + 1000 * number, lesson.batch, lesson.accounts)
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
        threads=torch.get_num_threads(), limits=Limits(sizes.slots, tokens=tokens + 16),
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
        "chain_tokens": tokens_of(sizes.accounts),
        "problems": told.samples,
        "solve_rate": round(told.rate, 4),
        "kv_bytes_per_token": told.kv.bytes_per_token,
        "chains_in_2_gib": told.kv.chains,
        "open_mib": told.kv.open_mib,
        "evicted": told.evicted,
        "tokens_per_s": round(told.tokens_per_s, 1),
    }


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("policy", "chain_tokens", "problems", "solve_rate", "chains_in_2_gib", "tokens_per_s")
    table = Table(*columns, title="Problems solved, and chains held, by how keys and values are kept")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
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
    with interruptible(out, resume):
        learnt = train(out / "model", model, sizes, resume)
        model.cpu()
        rows = [row_of(policy, judge(model, sizes, policy), sizes) for policy in POLICIES]
    report = {
        "machine": machine(),
        "sizes": asdict(sizes),
        "loss": learnt[-1]["loss"],
        "train_s": {name: sum(h[name] for h in learnt) for name in ("wall_s", "cpu_s")},
        "rows": rows,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    typer.run(main)
