"""`anabranch train` and `anabranch trace`."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.display import RunDisplay
from anabranch.cli.fail import INTERRUPTED, fails_clearly
from anabranch.cli.launch import launch, under_torchrun
from anabranch.errors import ConfigError
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.placement.base import Homes
from anabranch.placement.policy import make_planner
from anabranch.training.config import RunConfig
from anabranch.training.origin import find_origin
from anabranch.training.runner import run


def train_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank: train, showing the run on rank 0."""
    config = RunConfig.from_dict(settings)
    watchers = []
    if os.environ.get("RANK", "0") == "0":
        watchers.append(RunDisplay(config.experts.planner, config.steps))
    return asdict(run(config, watchers))


@fails_clearly
def train(
    model: Annotated[str, typer.Option(help="tiny, small, or a configuration or checkpoint folder")] = "tiny",
    data: Annotated[list[str] | None, typer.Option(help="stdlib, or text files and folders")] = None,
    out: Annotated[str, typer.Option(help="folder for everything the run writes")] = "runs/train",
    ranks: Annotated[int, typer.Option(help="processes")] = 2,
    ep_size: Annotated[int | None, typer.Option(help="ranks sharing one set of experts [default: all]")] = None,
    planner: Annotated[str, typer.Option(help="bounded, exact, static, least_loaded, periodic_replication")] = "bounded",
    epsilon: Annotated[float, typer.Option(help="load above the mean that bounded tolerates")] = 0.05,
    slots: Annotated[int | None, typer.Option(help="guest experts a rank may host [default: 2]")] = None,
    transport: Annotated[str, typer.Option(help="auto, all_to_all, dedup, all_gather")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 200,
    batch_size: Annotated[int, typer.Option(help="sequences a rank computes at once")] = 8,
    sequence_length: Annotated[int | None, typer.Option(help="tokens a sequence [default: the model's]")] = None,
    learning_rate: Annotated[float, typer.Option(help="peak, after warm-up")] = 2e-3,
    seed: Annotated[int, typer.Option(help="of weights and data order")] = 0,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints, 0 for none")] = 100,
    eval_every: Annotated[int, typer.Option(help="steps between evaluations, 0 for none")] = 50,
    max_bytes: Annotated[int, typer.Option(help="the most text read")] = 24_000_000,
    cache: Annotated[str, typer.Option(help="folder for tokenizers and token streams")] = "~/.cache/anabranch",
    timeout_s: Annotated[int, typer.Option(help="how long ranks wait for each other")] = 600,
    compare: Annotated[str | None, typer.Option(help="a planner to run too, on the same data")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last complete checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the run in the folder")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="print the summaries as JSON")] = False,
) -> None:
    """Train a Mixture-of-Experts model on text, over several processes."""
    settings = AdaptiveSettings(planner, epsilon, 2 if slots is None else slots, transport)
    config = RunConfig(
        model=model, data=tuple(data or ("stdlib",)), out=out, ranks=ranks, ep_size=ep_size, experts=settings,
        steps=steps, batch_size=batch_size, sequence_length=sequence_length, learning_rate=learning_rate,
        dtype=dtype, seed=seed, save_every=save_every, eval_every=eval_every, max_bytes=max_bytes, cache=cache,
        timeout_s=timeout_s, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    _check(config, explicit_slots=slots is not None)
    runs = [config]
    if compare is not None:
        other = replace(settings, planner=compare)
        runs.append(replace(config, experts=other, out=f"{out}/{compare}"))
    _run_all(runs, json_out)


@fails_clearly
def trace(
    out: Annotated[str, typer.Option(help="folder of the run; the trace is routing.npz in it")] = "runs/trace",
    model: Annotated[str, typer.Option(help="as in train")] = "tiny",
    data: Annotated[list[str] | None, typer.Option(help="as in train")] = None,
    ranks: Annotated[int, typer.Option(help="processes")] = 2,
    steps: Annotated[int, typer.Option(help="optimizer steps recorded")] = 20,
    batch_size: Annotated[int, typer.Option(help="sequences a rank computes at once")] = 8,
    every: Annotated[int, typer.Option(min=1, help="record every so many steps")] = 1,
    ids: Annotated[bool, typer.Option(help="record every token's experts, not only counts")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the run in the folder")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Record the natural routing of a training run: rows per source rank and expert, layer by layer."""
    config = RunConfig(
        model=model, data=tuple(data or ("stdlib",)), out=out, ranks=ranks, steps=steps, batch_size=batch_size,
        experts=AdaptiveSettings(planner="static"), save_every=0, eval_every=0, trace_every=every, trace_ids=ids,
        overwrite=overwrite,
    )  # fmt: skip
    _check(config, explicit_slots=False)
    _run_all([config], json_out)


def _check(config: RunConfig, *, explicit_slots: bool) -> None:
    """All that can be known before a process is started."""
    config.check()
    origin = find_origin(config.model, config.sequence_length)
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != config.ranks:
        raise ConfigError(
            f"{config.ranks} asked for, but torchrun started {os.environ['WORLD_SIZE']}; make them equal",
            setting="ranks",
        )
    experts = getattr(origin.config, "num_experts", None) or getattr(origin.config, "num_local_experts", 1)
    if config.group_size > experts:
        raise ConfigError(f"{config.group_size} ranks for {experts} experts; use at most as many", setting="ep_size")
    homes = Homes.contiguous(experts, config.group_size)
    certain = min(homes.slots, make_planner("exact").slots_needed(homes))
    needs_all = config.experts.planner == "exact" or config.experts.epsilon == 0
    if explicit_slots and needs_all and config.experts.slots < certain and config.experts.planner != "static":
        raise ConfigError(
            f"{config.experts.slots} guest slots are too few to level {homes.slots} experts a rank; "
            f"use slots={certain}, or planner=bounded with an epsilon above 0",
            setting="slots",
        )


def _run_all(runs: list[RunConfig], json_out: bool) -> None:
    """Run one after the other and print what came of them."""
    summaries = []
    for config in runs:
        summary = train_rank(config.to_dict()) if under_torchrun() else launch("train", config.to_dict(), config.ranks)
        summaries.append(summary)
        if summary["stopped_early"]:
            _say(f"stopped after step {summary['steps']}; go on with --resume --out {config.out}")
            raise typer.Exit(INTERRUPTED)
    if os.environ.get("RANK", "0") != "0":
        return
    if len(summaries) > 1:
        Path(runs[0].out_path / "comparison.json").write_text(json.dumps(summaries, indent=2))
    if json_out:
        typer.echo(json.dumps(summaries, indent=2))
    else:
        _print_table(summaries, runs)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)


ROWS = (
    ("steps", "steps", "{:d}"),
    ("first loss", "first_loss", "{:.4f}"),
    ("last loss", "last_loss", "{:.4f}"),
    ("validation loss", "eval_loss", "{:.4f}"),
    ("step, median ms", "step_ms_median", "{:.1f}"),
    ("tokens/s, median", "tokens_per_s", "{:,.0f}"),
    ("rank max/mean before", "max_mean_before", "{:.3f}"),
    ("rank max/mean after", "max_mean_after", "{:.3f}"),
    ("guests a step", "guests_per_step", "{:.1f}"),
    ("token MB a step", "token_mb_per_step", "{:.1f}"),
    ("weight MB a step", "weight_mb_per_step", "{:.1f}"),
    ("joules a step", "joules_per_step", "{:.2f}"),
)


def _print_table(summaries: list[dict[str, Any]], runs: list[RunConfig]) -> None:
    table = Table(title="the same data and weights" if len(runs) > 1 else None)
    table.add_column("")
    for summary in summaries:
        table.add_column(summary["planner"], justify="right")
    for label, key, form in ROWS:
        table.add_row(label, *(form.format(s[key]) for s in summaries))
    console = Console()
    console.print(table)
    if len(summaries) > 1:
        first, second = (s["losses"] for s in summaries[:2])
        apart = max((abs(a - b) / abs(b) for a, b in zip(first, second, strict=False)), default=0.0)
        ratio = summaries[1]["step_ms_median"] / summaries[0]["step_ms_median"]
        console.print(
            f"largest relative difference of a step's loss {apart:.1e}; "
            f"{summaries[1]['planner']} takes {ratio:.2f} times the step of {summaries[0]['planner']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    source = "measured by RAPL" if summaries[0]["energy_source"] == "rapl" else "estimated from CPU seconds"
    console.print(f"joules {source}; written to {runs[0].out}", highlight=False, soft_wrap=True)
