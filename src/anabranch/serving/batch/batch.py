"""Prompts through the engine to records: text, stop strings, votes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.voting import Ballot, Outcome
from anabranch.serving.batch.records import FailureRecord, Record, SampleRecord, VoteRecord
from anabranch.serving.engine import Engine
from anabranch.serving.text import Detokenizer


@dataclass(frozen=True)
class BatchSettings:
    """What is asked of each prompt. Raises ConfigError naming the setting."""

    # Its prompt is replaced by each prompt of the batch; prompt i draws with its seed + i.
    request: Request
    # A sample ends before any of these.
    stop: tuple[str, ...] = ()
    # A sample's answer is the first group of the last match; None for no vote.
    vote: re.Pattern[str] | None = None
    # As in `scheduling.voting.Ballot`.
    vote_confidence: float = 1.0
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.vote is not None and self.vote.groups < 1:
            raise ConfigError("must have a group, which is the answer", setting="vote")
        if self.request.samples > 1 and self.request.sampling.greedy:
            raise ConfigError(
                "more than one greedy sample are all alike; set a temperature", setting="samples"
            )
        Ballot(self.request.samples, self.vote_confidence)

    def answer(self, text: str) -> str | None:
        """What the text votes for."""
        assert self.vote is not None
        matches = list(self.vote.finditer(text))
        return matches[-1][1].strip() if matches and matches[-1][1] is not None else None


@dataclass(eq=False)
class _Prompt:
    """A prompt under way: its chains that still run, and its vote."""

    number: int
    ballot: Ballot
    running: set[Chain] = field(default_factory=set[Chain])


@dataclass(eq=False)
class _Running:
    chain: Chain
    prompt: _Prompt
    detokenizer: Detokenizer
    text: list[str] = field(default_factory=list[str])
    seen: int = 0


class Batch:
    """Add prompts, then `advance` while any is `open`. new_tokens: generated so far."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: BatchSettings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.new_tokens = 0
        self._running: dict[Chain, _Running] = {}

    @property
    def open(self) -> int:
        """Samples that have not ended."""
        return len(self._running)

    def add(
        self, number: int, prompt: tuple[int, ...], finished: Sequence[SampleRecord] = ()
    ) -> list[Record]:
        """Begin a prompt, without the samples that an earlier run finished. Records of what is over already."""
        asked, settings = self.settings.request, self.settings
        seeded = replace(asked.sampling, seed=(asked.sampling.seed + number) % 2**63)
        try:
            chains = self.engine.submit(replace(asked, prompt=prompt, sampling=seeded))
        except ConfigError as error:
            return [FailureRecord(number, str(error))]
        group = _Prompt(number, Ballot(asked.samples, settings.vote_confidence))
        for chain in chains:
            group.running.add(chain)
            self._running[chain] = _Running(chain, group, Detokenizer(self.tokenizer, settings.stop, prompt))
        by_sample = {record.sample: record for record in finished}
        for chain in chains:
            if (record := by_sample.get(chain.sample)) is not None:
                self._forget(chain)
                if settings.vote is not None:
                    group.ballot.cast(record.sample, settings.answer(record.text), len(record.tokens))
        return self._decide(group)

    def advance(self) -> list[Record]:
        """One step; records of what it ended."""
        return self.take(self.engine.advance())

    def take(self, chains: Sequence[Chain]) -> list[Record]:
        """Records of what a step ended that brought these chains on."""
        records: list[Record] = []
        for chain in chains:
            running = self._running.get(chain)
            if running is None:
                continue  # a vote has just cancelled it
            self._read(running)
            if chain.end is not None or running.detokenizer.stopped is not None:
                records += self._end(running)
        return records

    def _read(self, running: _Running) -> None:
        new = running.chain.tokens[len(running.chain.request.prompt) + running.seen :]
        running.text += map(running.detokenizer.push, new)
        running.seen += len(new)
        self.new_tokens += len(new)

    def _end(self, running: _Running) -> list[Record]:
        if self.settings.vote is None:
            record = self._record(running)
            self._forget(running.chain)
            return [record]
        return [self._cast(running), *self._decide(running.prompt)]

    def _decide(self, group: _Prompt) -> list[Record]:
        """Where the vote is decided: the vote, then the samples that it cancels."""
        if self.settings.vote is None or not group.ballot.decided:
            return []
        records: list[Record] = []
        for chain in sorted(group.running, key=lambda c: c.sample):
            if chain.end is not None:  # in the same step
                records.append(self._cast(self._running[chain]))
        left = sorted(group.running, key=lambda c: c.sample)
        outcome = group.ballot.outcome({c.sample: c.new_tokens for c in left})
        records.append(_vote(group.number, outcome))
        for chain in left:
            self.engine.cancel(chain)
            records.append(self._record(self._running[chain]))
            self._forget(chain)
        return records

    def _cast(self, running: _Running) -> SampleRecord:
        """The record of a finished sample, whose vote is counted."""
        record = self._record(running)
        self._forget(running.chain)
        running.prompt.ballot.cast(
            running.chain.sample, self.settings.answer(record.text), len(record.tokens)
        )
        return record

    def _record(self, running: _Running) -> SampleRecord:
        chain = running.chain
        self._read(running)
        running.text.append(running.detokenizer.finish())
        stopped = running.detokenizer.stopped is not None
        return SampleRecord(
            running.prompt.number, chain.sample, "".join(running.text),
            chain.tokens[len(chain.request.prompt) :],
            End.STOP.value if stopped or chain.end is None else chain.end.value,
            list(self.engine.logprobs[chain]) if self.settings.logprobs else None,
        )  # fmt: skip

    def _forget(self, chain: Chain) -> None:
        running = self._running.pop(chain)
        running.prompt.running.discard(chain)
        self.engine.cancel(chain)
        self.engine.completion(chain)


def _vote(number: int, outcome: Outcome) -> VoteRecord:
    return VoteRecord(
        number, outcome.answer, outcome.counts, outcome.finished, outcome.cancelled, outcome.saved_tokens
    )
