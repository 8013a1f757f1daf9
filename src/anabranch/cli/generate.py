"""`anabranch generate`."""

import hashlib
import json
import re
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig, PreTrainedTokenizerBase

from anabranch.cli.device import quiet
from anabranch.cli.fail import fails_clearly
from anabranch.cli.generation_display import GenerationDisplay, print_report
from anabranch.cli.process import say
from anabranch.errors import CheckpointError, ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.scheduling.thinking import Thinking
from anabranch.serving.batch.batch import Batch, BatchSettings
from anabranch.serving.batch.prompts import encode, read_prompts, tokens_of
from anabranch.serving.batch.records import FailureRecord, OutputFile, Record, SampleRecord, VoteRecord
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.loading import load_tokenizer, stop_tokens
from anabranch.telemetry.energy import EnergyMeter, open_meter
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
Threads = Annotated[int | None, typer.Option(help="of the native step [default: all cores]")]
Step = Annotated[str, typer.Option(help="auto, native (C++) or torch")]
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
    slots: Slots = 32,
    threads: Threads = None,
    step: Step = "auto",
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
    asked = {name: value for name, value in locals().items() if name not in FREE}
    quiet()
    read = read_prompts(Path(prompts))
    asked["prompts"] = hashlib.sha256(Path(prompts).read_bytes()).hexdigest()[:16]
    memory = {"memory_limit_mib": memory_limit_mib, "store_folder": store_folder, "evict_above": evict_above,
              "spill_mib": spill_mib, "spill_folder": spill_folder}  # fmt: skip
    engine_settings = EngineSettings(dtype, kv_dtype, kv_memory_mib, threads, step, Limits(slots), **memory)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    # The prompt stands for those of the file; what else can be wrong is said before the model is loaded.
    request = Request((0,), max_new_tokens, samples, sampling)
    settings = BatchSettings(request, tuple(stop or ()), _pattern(vote), vote_confidence, logprobs)
    folder = Path(model)
    tokenizer = load_tokenizer(folder)
    encoded = [encode(prompt, tokenizer, chat) for prompt in read]
    thinking = _thinking(tokenizer, thinking_budget, end_of_thought, closing_words)
    request = replace(request, stop_tokens=stop_tokens(folder, tokenizer), thinking=thinking)
    limits = _limits(folder, slots, encoded, max_new_tokens)
    _require_free(Path(out), asked, resume, overwrite)
    with Engine.from_folder(folder, replace(engine_settings, limits=limits)) as engine:
        _claim(Path(out), asked, resume)
        if engine.why_not_native is not None:
            say(f"transformers' own modules compute the steps: {engine.why_not_native}")
        batch = Batch(engine, tokenizer, replace(settings, request=request))
        with closing(OutputFile(Path(out))) as output:
            report = _run(batch, encoded, output, out)
    if json_out:
        typer.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_report(report, out)


# What may differ between a run and the one that it goes on from: it changes no sample beyond rounding.
FREE = (
    "out", "kv_memory_mib", "spill_mib", "spill_folder", "memory_limit_mib", "store_folder", "slots", "threads", "step",
    "resume", "overwrite", "json_out",
)  # fmt: skip


def _run(batch: Batch, prompts: list[tuple[int, ...]], output: OutputFile, out: str) -> dict[str, Any]:
    """Everything that the output file lacks; the report of it."""
    before: dict[int, list[SampleRecord]] = {}
    over: set[int] = set()  # prompts that failed or have voted
    for record in output.records:
        if isinstance(record, SampleRecord):
            before.setdefault(record.prompt, []).append(record)
        else:
            over.add(record.prompt)
    new: list[Record] = []
    wall_s, cpu_s, meter = time.perf_counter(), time.process_time(), open_meter()

    def keep(records: list[Record]) -> None:
        output.write(records)
        new.extend(
            record._replace(text="", tokens=[]) if isinstance(record, SampleRecord) else record
            for record in records
        )

    try:
        for number, prompt in enumerate(prompts):
            if number not in over:
                keep(batch.add(number, prompt, before.get(number, [])))
        with closing(GenerationDisplay(batch.open)) as display:
            while batch.open:
                if records := batch.advance():
                    keep(records)
                display.update(batch.open, batch.new_tokens)
                meter.joules()  # often, for a counter may wrap
    except KeyboardInterrupt:
        say(f"finished samples are in {out}; go on with --resume")
        raise
    return _report(batch, new, time.perf_counter() - wall_s, time.process_time() - cpu_s, meter)


def _report(
    batch: Batch, new: list[Record], wall_s: float, cpu_s: float, meter: EnergyMeter
) -> dict[str, Any]:
    """Of this run alone, not of one that it goes on from."""
    votes = [r for r in new if isinstance(r, VoteRecord)]
    failures = [r for r in new if isinstance(r, FailureRecord)]
    tally, tokens, joules = batch.engine.scheduler.tally, batch.new_tokens, meter.joules()
    store = batch.engine.store
    return {
        "samples": sum(isinstance(r, SampleRecord) for r in new),
        "votes": len(votes),
        "failed_prompts": len(failures),
        "first_failure": failures[0].error if failures else None,
        "new_tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
        "cpu_s_per_token": cpu_s / tokens if tokens else None,
        "joules_per_token": joules / tokens if tokens else None,
        "energy_source": meter.source,
        "cancelled_samples": sum(v.cancelled for v in votes),
        "saved_tokens": sum(v.saved_tokens for v in votes),
        "preempted": tally.preempted,
        "reused_prompt_tokens": tally.reused,
        "step": batch.engine.step.name,
        "why_not_native": batch.engine.why_not_native,
        "expert_store": None if store is None else {**store._asdict(), "hit_rate": store.hit_rate},
    }


def _thinking(
    tokenizer: PreTrainedTokenizerBase, budget: int | None, end: str, words: str
) -> Thinking | None:
    if budget is None:
        return None
    tokens = tokens_of("end_of_thought", end, tokenizer)
    return Thinking(budget, tokens, tokens_of("closing_words", words, tokenizer) if words else ())


def _limits(folder: Path, slots: int, prompts: list[tuple[int, ...]], new_tokens: int) -> Limits:
    """Room for the longest prompt, as far as the model's positions go."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return Limits(slots, tokens=min(config.max_position_embeddings, max(map(len, prompts)) + new_tokens))


def _require_free(out: Path, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise unless a generation with these settings may write to `out`."""
    beside = _settings_of(out)
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other; give one", setting="resume")
    if out.exists() and not (resume or overwrite):
        raise ConfigError(f"{out} exists; go on with --resume, or replace it with --overwrite", setting="out")
    if resume and out.exists():
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


def _pattern(vote: str | None) -> re.Pattern[str] | None:
    try:
        return None if vote is None else re.compile(vote)
    except re.error as error:
        raise ConfigError(f"{vote!r} is no regular expression: {error}", setting="vote") from error
