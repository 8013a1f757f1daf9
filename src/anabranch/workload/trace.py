"""The natural routing of a training run, recorded per layer and micro-batch: one compact .npz file.

Shape suffixes: N records, R source ranks, E experts, T tokens of one record (all ranks), K experts a token,
I tokens of all records.

The file (schema version 1; `docs/trace.md` says the same at length) is a compressed npz with these arrays:

    schema_version  int64 ()
    metadata        str ()           JSON object, the fields of `TraceMetadata`
    counts          int32 (N, R, E)  rows that source rank r routed to expert e
    layer, step, micro  int32 (N)    which layer, training step and micro-batch of the step a record is of
    ids             int32 (I, K)     optional: top-k ids of every token; records one after the other, inside
                                     a record the source ranks in order, each with sum_e counts / K tokens
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import TraceError
from anabranch.workload.scene import IntArray, contiguous_max_mean

SCHEMA_VERSION = 1


class TraceMetadata(TypedDict):
    """Of which run the trace is. tokens_per_rank: tokens of one source rank in one micro-batch."""

    model_type: str
    experts: int
    top_k: int
    ranks: int
    tokens_per_rank: int
    created: str
    anabranch_version: str


class LayerBalance(NamedTuple):
    """Rank max/mean of one layer under contiguous homes, over its records."""

    layer: int
    records: int
    mean_max_mean: float
    worst_max_mean: float


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Records of routed rows: int64 counts_NRE with the layer_N, step_N and micro_N they were taken at.

    ids: of each record the (T, K) top-k ids of its tokens, source ranks in order; None when not recorded.
    """

    counts_NRE: IntArray
    layer_N: IntArray
    step_N: IntArray
    micro_N: IntArray
    metadata: TraceMetadata
    ids: tuple[IntArray, ...] | None = None

    def ids_of(self, record: int) -> list[IntArray]:
        """Top-k ids of one record, one (S, K) array a source rank. Raises TraceError if there are none."""
        if self.ids is None:
            raise TraceError("the trace holds counts only: record it again with token ids", setting="ids")
        rows_R = self.counts_NRE[record].sum(axis=1)
        ends = np.cumsum(rows_R // self.metadata["top_k"])[:-1]
        return list(np.split(self.ids[record], ends))

    def summary(self) -> list[LayerBalance]:
        """Mean and worst rank max/mean of every layer, in order of layers."""
        ranks = self.metadata["ranks"]
        max_mean_N = np.array([contiguous_max_mean(c_RE.sum(axis=0), ranks) for c_RE in self.counts_NRE])
        of_layer = {int(layer): max_mean_N[self.layer_N == layer] for layer in np.unique(self.layer_N)}
        return [LayerBalance(n, m.size, float(m.mean()), float(m.max())) for n, m in of_layer.items()]


class TraceWriter:
    """Collects records in memory and writes them as one file, whole or not at all.

    `save` may be called at any time and again: it replaces the file by one of all records so far. As a
    context manager it saves on leaving, unless an exception ends the run: call `save` where an interrupted
    run should keep its records. One process writes: counts_RE are those of all ranks.
    """

    def __init__(
        self, path: Path, *, model_type: str, experts: int, top_k: int, ranks: int, tokens_per_rank: int
    ) -> None:
        self.path = path
        self.metadata = TraceMetadata(
            model_type=model_type,
            experts=experts,
            top_k=top_k,
            ranks=ranks,
            tokens_per_rank=tokens_per_rank,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            anabranch_version=_own_version(),
        )
        self._counts: list[NDArray[np.int32]] = []
        self._places: list[tuple[int, int, int]] = []
        self._ids: list[NDArray[np.int32]] = []

    def append(
        self,
        *,
        layer: int,
        step: int,
        micro: int,
        counts_RE: IntArray,
        ids_RSK: Sequence[IntArray] | None = None,
    ) -> None:
        """One layer and micro-batch. ids_RSK: top-k ids, one (S, K) array a source rank; always or never."""
        assert counts_RE.shape == (self.metadata["ranks"], self.metadata["experts"])
        assert (ids_RSK is not None) == bool(self._ids) or not self._counts
        if ids_RSK is not None:
            assert [ids_SK.size for ids_SK in ids_RSK] == counts_RE.sum(axis=1).tolist()
            self._ids.append(np.concatenate(ids_RSK).astype(np.int32))
        self._counts.append(counts_RE.astype(np.int32))
        self._places.append((layer, step, micro))

    def save(self) -> None:
        """Write all records so far: to a temporary file beside `path`, then by an atomic rename."""
        place_N3 = np.array(self._places, dtype=np.int32).reshape(-1, 3)
        shape = (-1, self.metadata["ranks"], self.metadata["experts"])
        arrays: dict[str, NDArray[np.generic]] = {
            "schema_version": np.array(SCHEMA_VERSION),
            "metadata": np.array(json.dumps(self.metadata)),
            "counts": np.array(self._counts, dtype=np.int32).reshape(shape),
            "layer": place_N3[:, 0],
            "step": place_N3[:, 1],
            "micro": place_N3[:, 2],
        }
        if self._ids:
            arrays["ids"] = np.concatenate(self._ids)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.save()


def _own_version() -> str:
    try:
        return version("anabranch")
    except PackageNotFoundError:
        return "not installed"


def load_trace(path: Path) -> RoutingTrace:
    """Read a trace. Raises TraceError naming the file, the field and what is wrong with it."""
    arrays = _read(path)
    if _take(path, arrays, "schema_version", "iu", 0) != SCHEMA_VERSION:
        found = arrays["schema_version"]
        raise _malformed(
            path, "schema_version", f"is {found}, this version reads {SCHEMA_VERSION}: record it again"
        )
    metadata = _metadata(path, _take(path, arrays, "metadata", "U", 0))
    counts_NRE = _take(path, arrays, "counts", "iu", 3).astype(np.int64)
    if counts_NRE.shape[1:] != (metadata["ranks"], metadata["experts"]):
        told = f"(N, {metadata['ranks']}, {metadata['experts']}) as metadata says"
        raise _malformed(path, "counts", f"has shape {counts_NRE.shape}, not {told}")
    if counts_NRE.min(initial=0) < 0 or (counts_NRE.sum(axis=2) % metadata["top_k"]).any():
        raise _malformed(
            path, "counts", f"must be rows of whole tokens, {metadata['top_k']} each, none negative"
        )
    layer_N, step_N, micro_N = (
        _place(path, arrays, name, len(counts_NRE)) for name in ("layer", "step", "micro")
    )
    ids = _ids(path, arrays, counts_NRE, metadata["top_k"]) if "ids" in arrays else None
    return RoutingTrace(counts_NRE, layer_N, step_N, micro_N, metadata, ids)


def _malformed(path: Path, field: str, problem: str) -> TraceError:
    return TraceError(f"{path}: field {field!r} {problem}", setting="trace")


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise TraceError(f"{path}: no such file; record one with `anabranch trace`", setting="trace")
    if not zipfile.is_zipfile(path):
        raise TraceError(f"{path}: not an .npz file, or cut short; record it again", setting="trace")
    field = "(index)"
    arrays: dict[str, NDArray[np.generic]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for field in file.files:
                arrays[field] = file[field]
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise _malformed(path, field, f"cannot be read ({error}); record the trace again") from error
    return arrays


def _take(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], field: str, kinds: str, dimensions: int
) -> NDArray[np.generic]:
    if field not in arrays:
        raise _malformed(path, field, "is missing; record the trace again")
    array = arrays[field]
    if array.dtype.kind not in kinds or array.ndim != dimensions:
        wanted = f"{'text' if kinds == 'U' else 'integers'} of {dimensions} dimensions"
        raise _malformed(path, field, f"is {array.dtype} of {array.ndim} dimensions, not {wanted}")
    return array


def _metadata(path: Path, text: NDArray[np.generic]) -> TraceMetadata:
    try:
        found = json.loads(str(text))
    except json.JSONDecodeError as error:
        raise _malformed(path, "metadata", f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise _malformed(path, "metadata", "is not a JSON object")
    metadata = cast("dict[str, object]", found)
    for name, kind in TraceMetadata.__annotations__.items():
        if type(metadata.get(name)) is not kind:
            raise _malformed(path, f"metadata.{name}", f"is {metadata.get(name)!r}, not {kind.__name__}")
        if kind is int and cast("int", metadata[name]) < 1:
            raise _malformed(path, f"metadata.{name}", f"is {metadata[name]}, must be at least 1")
    return cast("TraceMetadata", metadata)


def _place(path: Path, arrays: Mapping[str, NDArray[np.generic]], field: str, records: int) -> IntArray:
    place_N = _take(path, arrays, field, "iu", 1).astype(np.int64)
    if place_N.shape[0] != records:
        raise _malformed(path, field, f"has {place_N.shape[0]} records, counts has {records}")
    return place_N


def _ids(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], counts_NRE: IntArray, top_k: int
) -> tuple[IntArray, ...]:
    """Split per record, and check that counting them gives the counts back."""
    ids_IK = _take(path, arrays, "ids", "iu", 2).astype(np.int64)
    records, ranks, experts = counts_NRE.shape
    tokens_NR = counts_NRE.sum(axis=2) // top_k
    if ids_IK.shape != (int(tokens_NR.sum()), top_k):
        raise _malformed(
            path, "ids", f"has shape {ids_IK.shape}, counts make it ({tokens_NR.sum()}, {top_k})"
        )
    if ids_IK.size and not (ids_IK.min() >= 0 and ids_IK.max() < experts):
        raise _malformed(path, "ids", f"must lie between 0 and {experts - 1}")
    source_I = np.repeat(np.arange(records * ranks, dtype=np.int64), tokens_NR.ravel())
    cells = np.bincount((source_I[:, None] * experts + ids_IK).ravel(), minlength=counts_NRE.size)
    if not np.array_equal(cells, counts_NRE.ravel()):
        raise _malformed(path, "ids", "does not add up to counts")
    end_N = np.cumsum(tokens_NR.sum(axis=1), dtype=np.int64)
    return tuple(ids_IK[start:end] for start, end in pairwise([0, *end_N.tolist()]))


def natural_trace(preset: str = "tiny") -> Path:
    """The recorded routing of a preset that ships with the package (docs/trace.md: the command that made it)."""
    return Path(__file__).parent / f"natural_{preset}.npz"
