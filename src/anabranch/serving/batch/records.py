"""What a batch comes to, record by record, and the file of lines that holds them."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from anabranch.errors import CheckpointError

T = TypeVar("T", bound="SampleRecord | VoteRecord | FailureRecord")


class SampleRecord(NamedTuple):
    """One sample of a prompt. end: "stop", "length", or "cancelled" by a vote that was decided.

    text ends before a stop string; tokens are all that were generated. logprobs: None for a forced token.
    """

    prompt: int
    sample: int
    text: str
    tokens: list[int]
    end: str
    logprobs: list[float | None] | None = None


class VoteRecord(NamedTuple):
    """What a prompt's samples voted for; as `scheduling.voting.Outcome`."""

    prompt: int
    vote: str | None
    votes: dict[str, int]
    finished: int
    cancelled: int
    saved_tokens: float


class FailureRecord(NamedTuple):
    """Why a prompt could not be run."""

    prompt: int
    error: str


Record = SampleRecord | VoteRecord | FailureRecord


class OutputFile:
    """A file of records, a line each, written through at once. What it held when opened is in `records`.

    A last line that was cut off is dropped: so several processes may write to one file only once all have opened it.
    Raises CheckpointError for a file of other lines.
    """

    def __init__(self, path: Path) -> None:
        self.records: list[Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file.read().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self.records.append(_record(path, number, line))
            whole += len(line)
        self._file.truncate(whole)

    def write(self, records: list[Record]) -> None:
        """Append these, all in one piece."""
        rest = "".join(_line(r) for r in records).encode()
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """To the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _line(record: Record) -> str:
    content = record._asdict()
    if isinstance(record, SampleRecord) and record.logprobs is None:
        del content["logprobs"]
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        content: dict[str, Any] = dict(json.loads(line))
        kind = SampleRecord if "sample" in content else VoteRecord if "vote" in content else FailureRecord
        return kind(**content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}, line {number}: no line of a generation ({error}); name another file", setting="out"
        ) from error
