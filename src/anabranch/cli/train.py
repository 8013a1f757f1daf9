"""`anabranch train` and `anabranch trace`."""

import json
import os
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.comparison import print_summaries
from anabranch.cli.device import quiet
from anabranch.cli.display import RunDisplay
from anabranch.cli.fail import INTERRUPTED, fails_clearly
from anabranch.cli.launch import launch
from anabranch.cli.process import say, under_torchrun
from anabranch.costs.calibrate import Calibration
from anabranch.errors import AnabranchError, ConfigError
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.placement.policy import make_planner
from anabranch.planner.launch import read_launch
from anabranch.training.agreement import is_first, join, leave, on_all_ranks, require_equal
from anabranch.training.config import RunConfig
from anabranch.training.folder import write_json
from anabranch.training.origin import Origin
from anabranch.training.runner import run, usable_origin

PLANNERS = "bounded, exact, static, least_loaded, periodic_replication, or auto"


@fails_clearly
def plan_settings(context: typer.Context, plan: Path | None) -> Path | None:
    """Settings of a plan stand in for defaults: what is given on the command line goes before."""
    if plan is not None:
        context.default_map = {**(context.default_map or {}), **read_launch(plan)}
    return plan


Plan = Annotated[
    Path | None,
    typer.Option(
        is_eager=True, callback=plan_settings, help="settings from `anabranch plan --emit`; others go before"
    ),
]
Model = Annotated[str, typer.Option(help="tiny, tiny8, small, or a configuration or checkpoint folder")]
Data = Annotated[list[str] | None, typer.Option(help="stdlib, or text files and folders [default: stdlib]")]
Out = Annotated[str, typer.Option(help="folder for everything the run writes")]
Ranks = Annotated[int, typer.Option(help="processes")]
EpSize = Annotated[int | None, typer.Option(help="ranks that share one set of experts [default: all]")]
Planner = Annotated[str, typer.Option(help=PLANNERS)]
Epsilon = Annotated[float, typer.Option(help="load above the mean that bounded tolerates")]
GuestSlots = Annotated[int | None, typer.Option(help="guest experts a rank may host [default: 2]")]
Transport = Annotated[str, typer.Option(help="auto, all_to_all, dedup, two_level or all_gather")]
Chunks = Annotated[int, typer.Option(help="pieces of a micro-batch whose exchange and computation overlap")]
DispatchWire = Annotated[
    str, typer.Option(help="rows on their way out: none, bf16, int8, int8_stochastic, fp8")
]
CombineWire = Annotated[str, typer.Option(help="rows on their way back, likewise")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16")]
Steps = Annotated[int, typer.Option(help="optimizer steps")]
BatchSize = Annotated[int, typer.Option(help="sequences a rank computes at once")]
SequenceLength = Annotated[int | None, typer.Option(help="tokens a sequence [default: the model's]")]
LearningRate = Annotated[float, typer.Option(help="peak, after warm-up")]
Seed = Annotated[int, typer.Option(help="of weights and data order")]
SaveEvery = Annotated[int, typer.Option(help="steps between checkpoints; 0 for none but when interrupted")]
EvalEvery = Annotated[int, typer.Option(help="steps between evaluations; 0 for one at the end")]
MaxBytes = Annotated[int, typer.Option(help="the most text read")]
Cache = Annotated[str, typer.Option(help="folder for tokenizers and token streams")]
TimeoutS = Annotated[int, typer.Option(help="seconds that ranks wait for each other")]
Meter = Annotated[
    str, typer.Option(help="of energy: auto, rapl, zeus, neuron:WATTS or another of docs/energy.md")
]
Compare = Annotated[str | None, typer.Option(help="another planner to run too, on the same data")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the last complete checkpoint")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run in the folder")]
Json = Annotated[bool, typer.Option("--json", help="print the summaries as JSON")]


def train_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank: train, showing the run on rank 0."""
    config = RunConfig.from_dict(settings)
    first = os.environ.get("RANK", "0") == "0"
    with closing(RunDisplay(config.experts.planner, config.steps)) if first else nullcontext() as display:
        return run(config, calibration(config), [display] if display else []).to_dict()


def calibration(config: RunConfig) -> Calibration:
    """Where the measurements behind `auto` are kept."""
    return Calibration(Path(config.cache).expanduser() / "calibration")


@fails_clearly
def train(
    model: Model = "tiny",
    data: Data = None,
    out: Out = "runs/train",
    ranks: Ranks = 2,
    ep_size: EpSize = None,
    planner: Planner = "bounded",
    epsilon: Epsilon = 0.05,
    slots: GuestSlots = None,
    transport: Transport = "auto",
    chunks: Chunks = 1,
    dispatch_wire: DispatchWire = "none",
    combine_wire: CombineWire = "none",
    dtype: Dtype = "float32",
    steps: Steps = 200,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = None,
    learning_rate: LearningRate = 2e-3,
    seed: Seed = 0,
    save_every: SaveEvery = 100,
    eval_every: EvalEvery = 50,
    max_bytes: MaxBytes = 24_000_000,
    cache: Cache = "~/.cache/anabranch",
    timeout_s: TimeoutS = 600,
    meter: Meter = "auto",
    compare: Compare = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_out: Json = False,
    plan: Plan = None,
) -> None:
    """Train a Mixture-of-Experts model on text, over several processes."""

    def planned() -> list[RunConfig]:
        guests = 2 if slots is None else slots
        settings = AdaptiveSettings(planner, epsilon, guests, transport, chunks, dispatch_wire, combine_wire)
        config = RunConfig(
            model=model, data=tuple(data or ("stdlib",)), out=out, ranks=ranks, ep_size=ep_size,
            experts=settings, steps=steps, batch_size=batch_size, sequence_length=sequence_length,
            learning_rate=learning_rate, dtype=dtype, seed=seed, save_every=save_every,
            eval_every=eval_every, max_bytes=max_bytes, cache=cache, timeout_s=timeout_s, meter=meter, resume=resume,
            overwrite=overwrite,
        )  # fmt: skip
        origin = usable_origin(config)
        if slots is not None:
            _check_slots(config, origin)
        return [config] if compare is None else [config, _compared(config, compare)]

    _run_all(planned, timeout_s, json_out)


@fails_clearly
def trace(
    out: Out = "runs/trace",
    model: Model = "tiny",
    data: Data = None,
    ranks: Ranks = 2,
    ep_size: EpSize = None,
    steps: Steps = 20,
    batch_size: BatchSize = 8,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    max_bytes: MaxBytes = 24_000_000,
    cache: Cache = "~/.cache/anabranch",
    timeout_s: TimeoutS = 600,
    every: Annotated[int, typer.Option(min=1, help="record every so many steps")] = 1,
    ids: Annotated[bool, typer.Option("--ids", help="record every token's experts, not only counts")] = False,
    overwrite: Overwrite = False,
    json_out: Json = False,
) -> None:
    """Record the natural routing of a training run, in routing.npz: rows per source rank and expert."""

    def planned() -> list[RunConfig]:
        config = RunConfig(
            model=model, data=tuple(data or ("stdlib",)), out=out, ranks=ranks, ep_size=ep_size, steps=steps,
            experts=AdaptiveSettings(planner="static"), batch_size=batch_size, seed=seed,
            sequence_length=sequence_length, max_bytes=max_bytes, cache=cache, timeout_s=timeout_s,
            save_every=0, eval_every=0, trace_every=every, trace_ids=ids, overwrite=overwrite,
        )  # fmt: skip
        usable_origin(config)
        return [config]

    _run_all(planned, timeout_s, json_out)


def _check_slots(config: RunConfig, origin: Origin) -> None:
    """Raise ConfigError where the slots asked for cannot level every load, and the planner is to level it."""
    homes = origin.homes(config.group_size)
    certain = make_planner("exact").slots_needed(homes)
    planner = config.experts.planner
    levels = planner == "exact" or (planner == "bounded" and config.experts.epsilon == 0)
    if levels and config.experts.slots < certain:
        raise ConfigError(
            f"{config.experts.slots} guest slots a rank are too few to level {homes.slots} experts a rank; "
            f"use slots={certain}, or planner=bounded with an epsilon above 0",
            setting="slots",
        )


def _compared(config: RunConfig, planner: str) -> RunConfig:
    """The same run under another planner, in a folder inside the first one's."""
    if planner == config.experts.planner:
        raise ConfigError(f"{planner} is the run's own planner; name another one", setting="compare")
    try:
        experts = replace(config.experts, planner=planner)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("planner: "), setting="compare") from error
    other = replace(config, experts=experts, out=f"{config.out}/{planner}")
    if config.resume and not other.folder.resumable:
        # The first run was stopped before this one began, or had anything to go on from.
        other = replace(other, resume=False, overwrite=True)
    usable_origin(other)
    return other


def _run_all(planned: Callable[[], list[RunConfig]], timeout_s: int, json_out: bool) -> None:
    """Run one after the other and print what came of them; to resume a finished run is to report it."""
    if under_torchrun():
        quiet()
        join(max(1, timeout_s))
    try:
        stopped = not _run_each(planned, json_out)
    except AnabranchError:
        leave()  # all ranks raise it
        raise
    leave()
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _run_each(planned: Callable[[], list[RunConfig]], json_out: bool) -> bool:
    """Whether all runs came to their end."""
    runs = on_all_ranks(planned)
    require_equal({"compare": [config.experts.planner for config in runs[1:]]})
    summaries: list[dict[str, Any]] = []
    for config in runs:
        summary = (config.resume and config.folder.finished()) or _trained(config)
        summaries.append(summary)
        if summary["stopped_early"]:
            kept = "the steps so far are in routing.npz" if config.trace_every else "go on with --resume"
            say(f"stopped after step {summary['steps']} of {config.steps}, saved in {config.out}; {kept}")
            return False
    if is_first():
        _report(runs[0], summaries, json_out)
    return True


def _report(config: RunConfig, summaries: list[dict[str, Any]], json_out: bool) -> None:
    if len(summaries) > 1:
        write_json(config.folder.comparison, summaries)
    if json_out:
        typer.echo(json.dumps(summaries, indent=2, allow_nan=False))
    else:
        print_summaries(summaries, config.out)


def _trained(config: RunConfig) -> dict[str, Any]:
    if under_torchrun():
        return train_rank(config.to_dict())
    return launch("train", config.to_dict(), config.ranks, timeout_s=config.timeout_s)
