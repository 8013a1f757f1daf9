"""One generation: what its arguments ask for, and its run in one process or over several ranks."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

import anabranch
from anabranch.cli.generation_display import GenerationDisplay
from anabranch.cli.process import say
from anabranch.errors import ConfigError
from anabranch.integrations.transformers import AdaptiveSettings
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.scheduling.thinking import Thinking
from anabranch.serving.batch.batch import Batch, BatchSettings
from anabranch.serving.batch.prompts import encode, read_prompts, tokens_of
from anabranch.serving.batch.records import FailureRecord, OutputFile, Record, SampleRecord, VoteRecord
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.loading import load_config, load_spread, load_tokenizer, positions_of, stop_tokens
from anabranch.serving.parallel import ParallelEngine
from anabranch.telemetry.energy import open_meter
from anabranch.telemetry.energy.estimate import EstimateMeter
from anabranch.training.agreement import gathered, is_first, join, on_all_ranks

TIMEOUT_S = 600


class Generation(NamedTuple):
    """Checked as far as it can be before a model is loaded."""

    folder: Path
    out: Path
    prompts: list[tuple[int, ...]]
    tokenizer: PreTrainedTokenizerBase
    engine: EngineSettings
    batch: BatchSettings
    ranks: int
    experts: AdaptiveSettings


def planned(asked: Mapping[str, Any]) -> Generation:
    """Of the arguments of `anabranch generate`. Raises ConfigError and CheckpointError, naming the setting."""
    ranks, step, vote = asked["ranks"], asked["step"], asked["vote"]
    if ranks > 1 and step == "native":
        raise ConfigError(
            "experts on several ranks are computed by transformers' modules; leave it out", setting="step"
        )
    wire = asked["wire"]
    experts = AdaptiveSettings(
        asked["planner"], transport=asked["transport"], dispatch_wire=wire, combine_wire=wire
    )
    read = read_prompts(Path(asked["prompts"]))
    memory = {name: asked[name] for name in MEMORY}
    engine = EngineSettings(
        threads=asked["threads"],
        step=step if ranks == 1 else "torch",
        limits=Limits(asked["slots"]),
        **memory,
    )
    sampling = Sampling(**{name: asked[name] for name in SAMPLING})
    # The prompt stands for those of the file.
    request = Request((0,), asked["max_new_tokens"], asked["samples"], sampling)
    answers, confidence = None if vote is None else _pattern(vote), asked["vote_confidence"]
    batch = BatchSettings(request, tuple(asked["stop"] or ()), answers, confidence, asked["logprobs"])
    folder = Path(asked["model"])
    tokenizer = load_tokenizer(folder)
    prompts = [encode(prompt, tokenizer, asked["chat"]) for prompt in read]
    request = replace(
        request, stop_tokens=stop_tokens(folder, tokenizer), thinking=_thinking(asked, tokenizer)
    )
    limits = _limits(folder, asked["slots"], prompts, asked["max_new_tokens"])
    return Generation(
        folder, Path(asked["out"]), prompts, tokenizer, replace(engine, limits=limits), replace(batch, request=request),
        ranks, experts,
    )  # fmt: skip


MEMORY = (
    "dtype", "kv_dtype", "kv_memory_mib", "memory_limit_mib", "store_folder", "evict_above", "spill_mib",
    "spill_folder", "speculate",
)  # fmt: skip
SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")


def _limits(folder: Path, slots: int, prompts: list[tuple[int, ...]], new_tokens: int) -> Limits:
    """Room for the longest prompt, as far as the model's positions go."""
    longest = max(map(len, prompts)) + new_tokens
    return Limits(slots, tokens=min(positions_of(load_config(folder)), longest))


def _thinking(asked: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Thinking | None:
    budget, words = asked["thinking_budget"], asked["closing_words"]
    if budget is None:
        if words:
            raise ConfigError("are said at the end of a thinking_budget; give one", setting="closing_words")
        return None
    tokens = tokens_of("end_of_thought", asked["end_of_thought"], tokenizer)
    return Thinking(budget, tokens, tokens_of("closing_words", words, tokenizer) if words else ())


def _pattern(vote: str) -> re.Pattern[str]:
    try:
        return re.compile(vote)
    except re.error as error:
        raise ConfigError(f"{vote!r} is no regular expression: {error}", setting="vote") from error


def run_alone(work: Generation, begin: Callable[[], None]) -> dict[str, Any]:
    """Everything that the output file lacks; the report of it. begin: called once the model is there."""
    with Engine.from_folder(work.folder, work.engine) as engine:
        begin()
        if engine.why_not_native is not None:
            say(f"transformers' own modules compute the steps: {engine.why_not_native}")
        with closing(OutputFile(work.out)) as output:
            run = _Run(work, engine, output)
            run.add(0)
            with closing(GenerationDisplay(run.batch.open)) as display:
                while run.batch.open:
                    run.keep(run.batch.advance())
                    display.update(run.batch.open, run.batch.new_tokens)
            return _report([run.figures()], engine)


def run_on_rank(work: Generation, begin: Callable[[], None]) -> dict[str, Any]:
    """The same on one of the ranks: prompt i is that of rank i modulo their number, and all write to one file.

    Collective. The report is of all ranks.
    """
    join(TIMEOUT_S)
    e = work.experts
    anabranch.enable(
        e.planner, transport=e.transport, dispatch_wire=e.dispatch_wire, combine_wire=e.combine_wire
    )
    model = on_all_ranks(lambda: load_spread(work.folder, work.engine.load_dtype, work.ranks))
    with on_all_ranks(lambda: Engine(model, work.engine)) as engine:
        parallel = ParallelEngine(engine)
        on_all_ranks(begin if is_first() else lambda: None)
        # All have opened it before any writes: opening drops a line that was cut off.
        with closing(on_all_ranks(lambda: OutputFile(work.out))) as output, parallel.together():
            run = _Run(work, engine, output)
            run.add(parallel.rank)
            agreed = parallel.agree(run.batch.open)
            with closing(GenerationDisplay(agreed.left)) if is_first() else nullcontext() as display:
                while agreed.left:
                    run.keep(run.batch.take(parallel.advance()))
                    agreed = parallel.agree(run.batch.open, run.batch.new_tokens)
                    if display is not None:
                        display.update(*agreed)
        return _report(gathered(run.figures()), engine)


class _Figures(NamedTuple):
    """Of this run alone, not of one that it goes on from, on one rank."""

    samples: int
    votes: int
    failures: list[str]
    new_tokens: int
    wall_s: float
    cpu_s: float
    joules: float
    energy_source: str
    cancelled: int
    saved_tokens: float
    preempted: int
    reused: int
    guessed: int
    right: int


class _Run:
    """This process's part of a generation: new records go to the file, and what the report is made of is kept."""

    def __init__(self, work: Generation, engine: Engine, output: OutputFile) -> None:
        self.work, self.output = work, output
        self.batch = Batch(engine, work.tokenizer, work.batch)
        self.new: list[Record] = []
        self.began_s, self.cpu_s, self.meter = time.perf_counter(), time.process_time(), open_meter()

    def add(self, rank: int) -> None:
        """Begin what is missing of the prompts of this rank."""
        before: dict[int, list[SampleRecord]] = {}
        over: set[int] = set()  # prompts that have voted; one that failed is tried again
        for record in self.output.records:
            if isinstance(record, SampleRecord):
                before.setdefault(record.prompt, []).append(record)
            elif isinstance(record, VoteRecord):
                over.add(record.prompt)
        for number in range(rank, len(self.work.prompts), self.work.ranks):
            if number not in over:
                self.keep(self.batch.add(number, self.work.prompts[number], before.get(number, [])))

    def keep(self, records: list[Record]) -> None:
        if records:
            self.output.write(records)
        self.new += [r._replace(text="", tokens=[]) if isinstance(r, SampleRecord) else r for r in records]
        self.meter.joules()  # often, for a counter may wrap

    def figures(self) -> _Figures:
        votes = [r for r in self.new if isinstance(r, VoteRecord)]
        tally, meter = self.batch.engine.scheduler.tally, self.meter
        return _Figures(
            samples=sum(isinstance(r, SampleRecord) for r in self.new),
            votes=len(votes),
            failures=[r.error for r in self.new if isinstance(r, FailureRecord)],
            new_tokens=self.batch.new_tokens,
            wall_s=time.perf_counter() - self.began_s,
            cpu_s=time.process_time() - self.cpu_s,
            joules=meter.joules() if is_first() or not meter.whole_machine else 0.0,
            energy_source=meter.source,
            cancelled=sum(v.cancelled for v in votes),
            saved_tokens=sum(v.saved_tokens for v in votes),
            preempted=tally.preempted,
            reused=tally.reused,
            guessed=tally.drafted,
            right=tally.accepted,
        )


def _report(ranks: Sequence[_Figures], engine: Engine) -> dict[str, Any]:
    failures = [error for rank in ranks for error in rank.failures]
    tokens, wall_s = sum(r.new_tokens for r in ranks), max(r.wall_s for r in ranks)
    store, counted = engine.store, ranks[0].energy_source != EstimateMeter.source
    return {
        "ranks": len(ranks),
        "samples": sum(r.samples for r in ranks),
        "votes": sum(r.votes for r in ranks),
        "failed_prompts": len(failures),
        "first_failure": failures[0] if failures else None,
        "new_tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
        "cpu_s_per_token": sum(r.cpu_s for r in ranks) / tokens if tokens else None,
        # An estimate would only be these seconds once more, in another unit.
        "joules_per_token": sum(r.joules for r in ranks) / tokens if tokens and counted else None,
        "energy_source": ranks[0].energy_source if counted else None,
        "cancelled_samples": sum(r.cancelled for r in ranks),
        "saved_tokens": sum(r.saved_tokens for r in ranks),
        "preempted": sum(r.preempted for r in ranks),
        "reused_prompt_tokens": sum(r.reused for r in ranks),
        "guessed_tokens": sum(r.guessed for r in ranks),
        "right_guesses": sum(r.right for r in ranks),
        "step": engine.step.name,
        "why_not_native": engine.why_not_native,
        "expert_store": None if store is None else {**store._asdict(), "hit_rate": store.hit_rate},
    }
