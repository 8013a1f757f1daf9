"""`anabranch generate`."""

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.device import quiet
from anabranch.cli.fail import fails_clearly
from anabranch.cli.generation import TIMEOUT_S, planned, run_alone, run_on_rank
from anabranch.cli.generation_display import print_report
from anabranch.cli.launch import launch
from anabranch.cli.process import say
from anabranch.errors import CheckpointError, ConfigError
from anabranch.serving.engine import EngineSettings
from anabranch.serving.loading import fingerprint
from anabranch.training.checkpoints import difference
from anabranch.training.folder import write_json

Model = Annotated[str, typer.Argument(help="folder of a model, as save_pretrained writes it")]
Prompts = Annotated[str, typer.Option(help=".txt: one a line; .jsonl: objects with prompt or messages")]
Out = Annotated[str, typer.Option(help="JSONL file for the samples, in the order in which they end")]
Samples = Annotated[int, typer.Option(help="of each prompt")]
MaxNewTokens = Annotated[int, typer.Option(help="of a sample, thought included")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token")]
TopK = Annotated[int, typer.Option(help="only so many most probable tokens; 0 for all")]
TopP = Annotated[float, typer.Option(help="only the most probable tokens that reach this sum")]
MinP = Annotated[float, typer.Option(help="only tokens of this fraction of the highest probability")]
RepetitionPenalty = Annotated[float, typer.Option(help="divides logits of tokens already there")]
Seed = Annotated[int, typer.Option(help="of the first prompt's random numbers; prompt i has seed + i")]
Stop = Annotated[list[str] | None, typer.Option(help="end a sample before this string; may be repeated")]
Chat = Annotated[bool, typer.Option("--chat", help="put prompts into the model's chat template")]
Dtype = Annotated[str | None, typer.Option(help="of weights: float32, bfloat16, int8 [default: the model's]")]
KvDtype = Annotated[
    str | None, typer.Option(help="of cached keys and values, likewise or int4 [default: --dtype]")
]
KvMemory = Annotated[int, typer.Option(help="MiB for keys and values")]
EvictAbove = Annotated[
    int | None, typer.Option(help="tokens a sample keeps at most while it decodes [default: all]")
]
Spill = Annotated[int, typer.Option(help="MiB for keys and values of samples that wait")]
SpillFolder = Annotated[str | None, typer.Option(help="where to keep these [default: in memory]")]
MemoryLimit = Annotated[int | None, typer.Option(help="MiB for weights; other experts stay on disk")]
StoreFolder = Annotated[str, typer.Option(help="where these are kept, packed, for this run and later ones")]
Slots = Annotated[int, typer.Option(help="samples computed at once")]
Speculate = Annotated[int, typer.Option(help="tokens guessed ahead at most, where that pays")]
Threads = Annotated[int | None, typer.Option(help="of the native step [default: all cores]")]
Step = Annotated[str, typer.Option(help="auto, native (C++), torch or compiled")]
Ranks = Annotated[int, typer.Option(min=1, help="processes that experts are spread over")]
Planner = Annotated[str, typer.Option(help="who computes which rows, over several ranks; as in train")]
Transport = Annotated[str, typer.Option(help="how rows travel between ranks; as in train")]
Wire = Annotated[str, typer.Option(help="rows between ranks: none, bf16, int8, int8_stochastic, fp8")]
ThinkingBudget = Annotated[int | None, typer.Option(help="new tokens before the thought is ended")]
EndOfThought = Annotated[str, typer.Option(help="what ends a thought")]
Closing = Annotated[str, typer.Option(help="words before an end of thought that is forced")]
Vote = Annotated[str | None, typer.Option(help="a regular expression; its last match's group is the answer")]
VoteConfidence = Annotated[float, typer.Option(help="ends a vote early; 1: only when certain")]
Logprobs = Annotated[bool, typer.Option("--logprobs", help="write each token's log-probability")]
Resume = Annotated[bool, typer.Option("--resume", help="only what the output file lacks")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output file")]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]


@fails_clearly
def generate(
    model: Model,
    prompts: Prompts,
    out: Out,
    samples: Samples = 1,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    chat: Chat = False,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    kv_memory_mib: KvMemory = 512,
    evict_above: EvictAbove = None,
    spill_mib: Spill = 0,
    spill_folder: SpillFolder = None,
    memory_limit_mib: MemoryLimit = None,
    store_folder: StoreFolder = EngineSettings.store_folder,
    speculate: Speculate = 0,
    slots: Slots = 32,
    threads: Threads = None,
    step: Step = "auto",
    ranks: Ranks = 1,
    planner: Planner = "bounded",
    transport: Transport = "auto",
    wire: Wire = "none",
    thinking_budget: ThinkingBudget = None,
    end_of_thought: EndOfThought = "</think>",
    closing_words: Closing = "",
    vote: Vote = None,
    vote_confidence: VoteConfidence = 1.0,
    logprobs: Logprobs = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_out: Json = False,
) -> None:
    """Continue the prompts of a file by a model, each `samples` times."""
    given = dict(locals())
    quiet()
    work = planned(given)
    asked = {name: value for name, value in given.items() if name not in FREE}
    asked["weights"] = fingerprint(Path(model))
    asked["prompts"] = hashlib.sha256(Path(prompts).read_bytes()).hexdigest()[:16]
    _require_free(work.out, asked, resume, overwrite)
    try:
        if ranks == 1:
            report = run_alone(work, partial(_claim, work.out, asked, resume))
        else:
            report = launch("generate", {"given": given, "asked": asked}, ranks, timeout_s=TIMEOUT_S)
    except KeyboardInterrupt:
        with suppress(CheckpointError):  # before the model is there, nothing is claimed
            _require_same(work.out, asked)
            say(f"finished samples are in {out}; go on with --resume")
        raise
    if json_out:
        typer.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_report(report, out)


def generate_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank."""
    work = planned(settings["given"])
    return run_on_rank(work, partial(_claim, work.out, settings["asked"], settings["given"]["resume"]))


# What may differ between a run and the one that it goes on from: it changes no sample beyond rounding.
FREE = (
    "out", "kv_memory_mib", "spill_mib", "spill_folder", "memory_limit_mib", "store_folder", "slots", "threads", "step",
    "speculate", "resume", "overwrite", "json_out", "ranks", "planner", "transport",
)  # fmt: skip


def _require_free(out: Path, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise unless a generation with these settings may write to `out`."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other; give one", setting="resume")
    if out.exists() and not (resume or overwrite):
        raise ConfigError(f"{out} exists; go on with --resume, or replace it with --overwrite", setting="out")
    if resume and out.exists():
        _require_same(out, asked)


def _require_same(out: Path, asked: dict[str, Any]) -> None:
    """Raise CheckpointError unless `out` was begun with these settings."""
    beside = _settings_of(out)
    try:
        held = dict(json.loads(beside.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{beside} cannot be read: {error}", setting="resume") from error
    if changed := difference(held, asked):
        raise CheckpointError(f"{out} was made otherwise: {changed}", setting="resume")


def _claim(out: Path, asked: dict[str, Any], resume: bool) -> None:
    """Begin `out`, unless it goes on, with the settings beside it. Only once the model is there."""
    if resume and out.exists():
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"")
        write_json(_settings_of(out), asked)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}", setting="out") from error


def _settings_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.settings.json")
