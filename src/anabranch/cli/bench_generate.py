"""`anabranch bench generate`: how fast engines decode, beside what this machine could do at most."""

import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from anabranch.cli.cluster_book import comparable, rows_of
from anabranch.cli.generate_cases import TIMED_S, TRAINED, VLLM, GenerateCase, Sizes, fit, sizes_of, wanted
from anabranch.cli.generate_engines import Rate, Turn
from anabranch.cli.launch import launch
from anabranch.cli.process import say
from anabranch.cli.roofs import measure_roof, typical
from anabranch.cli.steal import Steal
from anabranch.cli.vllm_process import VllmProcess
from anabranch.costs.decode import Roof, decode_bound
from anabranch.errors import AnabranchError, ConfigError
from anabranch.scheduling.pages import PAGE
from anabranch.serving.loading import load_config, positions_of
from anabranch.training.config import RunConfig

GIB = 1 << 30
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}
TRAIN_STEPS = 60
# A case of which a hypervisor took more than this part of all CPU time is measured again, at most so often in all.
STOLEN, ATTEMPTS = 0.02, 3
# Where the code of a row starts. What vLLM's own Python runs is imported by nobody.
ENTRIES = ("anabranch.cli.bench_generate", "anabranch.cli.generate_engines", "anabranch.cli.vllm_decode")


class Model(NamedTuple):
    """A folder that every engine loads. name: RANDOM or TRAINED."""

    name: str
    folder: Path


class Measured(NamedTuple):
    """Of one case. stolen: the part of all CPU time a hypervisor took."""

    rate: Rate
    turns: list[Turn]
    stolen: float


def bench_generate(
    models: list[Model], cases: list[GenerateCase], vllm_python: Path | None, held: Sequence[dict[str, Any]] = (),
    timed_s: float = TIMED_S,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row a case, as it is measured, in a process of its own; engines at one size one after the other, for what a
    shared machine can do changes within minutes. Therefore roofs, too, are measured with each.

    held: rows of an interrupted run, not measured again. timed_s: seconds timed of each case, at least. An engine that
    fails is told, and what is left is measured all the same; then AnabranchError is raised.
    """
    failed: list[str] = []
    for model in models:
        sizes, most = sizes_of(model.folder), positions_of(load_config(model.folder))
        known = [_key(row) for row in held if row["model"] == model.name]
        fitted = [fit(case, most) for case in cases if wanted(model.name, case)]
        missing = [case for case in fitted if _key(asdict(case)) not in known]
        for dtype in sorted({case.dtype for case in missing}):
            with ExitStack() as stack:
                mine = sorted((case for case in missing if case.dtype == dtype), key=_size)
                theirs = [case for case in mine if case.engine == VLLM]
                vllm: VllmProcess | None = None
                for case in mine:
                    try:
                        if case.engine == VLLM and vllm is None:
                            assert vllm_python is not None
                            vllm = stack.enter_context(VllmProcess(vllm_python, model.folder, theirs))
                        yield _row(model, sizes, case, _measured(model.folder, case, vllm, timed_s))
                    except AnabranchError as error:
                        failed.append(f"{model.name}, {case}: {error}")
                        say(f"failed: {failed[-1]}")
    if failed:
        raise AnabranchError(f"{len(failed)} cases failed, all others are measured; the first: {failed[0]}")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in GenerateCase.__dataclass_fields__)


def _size(case: GenerateCase) -> tuple[Any, ...]:
    """What is compared stands together; our own engine before the others."""
    return case.prompt_tokens, case.batch, case.samples, case.new_tokens > 1000, case.engine


def _measured(folder: Path, case: GenerateCase, vllm: VllmProcess | None, timed_s: float) -> Measured:
    settings = {"model": str(folder), "case": asdict(case), "timed_s": timed_s}
    found: list[Measured] = []
    while not found or (found[-1].stolen > STOLEN and len(found) < ATTEMPTS):
        steal = Steal()
        if case.engine == VLLM:
            assert vllm is not None
            before, rate = measure_roof(case.dtype), vllm.measure(case, timed_s)
            turns = [Turn(rate.tokens_per_s, typical([before, measure_roof(case.dtype)]))]
        else:
            told = launch("measure_generate", settings, 1)
            rate, turns = Rate(**told["rate"]), [Turn(speed, Roof(**roof)) for speed, roof in told["turns"]]
        found.append(Measured(rate, turns, steal.part()))
    return min(found, key=lambda measured: measured.stolen)


def held_rows(json_file: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Rows that an interrupted benchmark left in the file. Raises ConfigError as `rows_of`."""

    def judge(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if not row["model"] or not _key(row) or not 0 < row["tokens_per_s"] < math.inf:
                raise ValueError("a row is of something else")

    return rows_of(json_file, about_generate(quick), judge)


def about_generate(quick: bool) -> dict[str, Any]:
    """What rows of one file have in common."""
    return comparable({"quick": quick}, ENTRIES)


def line_of(row: dict[str, Any]) -> str:
    """A row in short, for people who wait."""
    size = f"{row['model']}, {row['dtype']}, batch {row['batch']}, prompt {row['prompt_tokens']}"
    return f"{row['engine']}: {row['tokens_per_s']} tokens/s, {row['roof_fraction']:.0%} of the roof ({size})"


def _row(model: Model, sizes: Sizes, case: GenerateCase, measured: Measured) -> dict[str, Any]:
    rate, roof = measured.rate, typical([turn.roof for turn in measured.turns])
    kv_bytes = sizes.kv.page_bytes("bfloat16" if case.kv_dtype == "float16" else case.kv_dtype) / PAGE
    # Half of the new tokens are cached in the mean; prompts that samples share are read once.
    cached = case.batch * (case.prompt_tokens / case.samples + case.new_tokens / 2)
    attended = case.batch * (case.prompt_tokens + case.new_tokens / 2)
    work = case.batch, cached, WEIGHT_BYTES[case.dtype], kv_bytes, attended
    bound = decode_bound(sizes.decode, roof, *work)
    # Memory's speed changes by half within seconds: each turn is held against the roof of its own time.
    fractions = [t.tokens_per_s * decode_bound(sizes.decode, t.roof, *work).step_ms for t in measured.turns]
    return {
        "model": model.name,
        **asdict(case),
        "tokens_per_s": round(rate.tokens_per_s, 1),
        "spread": round(rate.spread, 3),
        "parts": rate.parts,
        "threads": os.cpu_count(),
        "bytes_per_token": round(bound.read_bytes / case.batch),
        "roof_tokens_per_s": round(1e3 * case.batch / bound.step_ms, 1),
        "roof_fraction": round(median(fractions) / 1e3 / case.batch, 4),
        "bound_by": bound.by,
        "read_gbps": round(roof.read_gbps, 1),
        "gflops": round(roof.gflops, 1),
        "stolen_percent": round(100 * measured.stolen, 2),
        "resident_mib": round(rate.resident_mib),
        "kv_tokens_per_gib": round(GIB / kv_bytes),
    }


def require_vllm(python: Path | None) -> None:
    """Raise ConfigError where an interpreter was named that has no vLLM."""
    if python is not None:
        try:
            found = subprocess.run([str(python), "-c", "import vllm"], capture_output=True, check=False)
        except OSError as error:
            raise ConfigError(
                f"{python} cannot be started: {error.strerror}", setting="vllm_python"
            ) from error
        if found.returncode:
            raise ConfigError(f"{python} cannot import vllm; name one that can", setting="vllm_python")


def train_small(folder: Path) -> Path:
    """The preset `small`, trained for some steps on the standard library; a folder that has it is taken as it is."""
    out = folder / "small"
    if not (out / "model" / "config.json").exists():
        config = RunConfig(
            model=TRAINED, ranks=1, steps=TRAIN_STEPS, out=str(out), save_every=0, eval_every=0, dtype="bfloat16"
        )  # fmt: skip
        launch("train", config.to_dict(), 1)
    return out / "model"
