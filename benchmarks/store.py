"""Models with all, half and a third of their bytes in memory, the other experts on disk:

    python -m benchmarks.store --json store.json       # --quick: fewer tokens and layers, under 2 minutes

Each run has a process of its own. A model trained on real text tells the hit rate; a larger one of random weights,
whose routing is even, tells memory and speed at the worst. The reference has all experts in memory, and every run must
generate what it generates: ends with 1 where one does not.
"""

import inspect
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.cli.device import quiet
from anabranch.cli.fail import FAILED, fails_clearly
from anabranch.cli.launch import launch
from anabranch.cli.results import require_json_file, show_rows, write_results
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import MIB, Engine, EngineSettings
from anabranch.serving.step.native import NativeStep
from anabranch.serving.store.arena import StoreFigures
from anabranch.telemetry.memory import peak_resident_bytes, resident_bytes
from anabranch.training.config import RunConfig
from anabranch.training.presets import presets

SHARES = (1.0, 1 / 2, 1 / 3)  # of the model's bytes
THREADS = 2
PROMPT_TOKENS = 64
# Holds all chains of any run here: none is preempted, whose tokens would be computed twice.
KV_MIB = 32
# A measuring process that takes longer hangs.
RUN_S = 1800


class StoreRun(NamedTuple):
    """What one process measures. limit_mib: None for all experts in memory."""

    folder: str
    store_folder: str
    dtype: str
    batch: int
    new_tokens: int
    limit_mib: int | None


def bench_store(steps: int, quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """A row a model, batch and limit, as they are measured. steps: of the training of the trained model."""
    quiet()
    config = RunConfig(model="tiny", steps=steps, out=str(folder / "trained"), save_every=0, eval_every=0)
    launch("train", config.to_dict(), config.ranks)
    models = [("tiny", f"trained {steps} steps on text", folder / "trained" / "model", "float32")]
    models.append(("large", "random", _random_model(folder / "random", quick), "bfloat16"))
    for name, weights, path, dtype in models:
        for batch in (1, 8):
            about = {"model": name, "weights": weights, "dtype": dtype, "batch": batch}
            run = StoreRun(str(path), str(folder / "store"), dtype, batch, 48 if quick else 192, None)
            for row in _rows(run):
                yield {**about, **row}


def _rows(run: StoreRun) -> Iterator[dict[str, Any]]:
    whole = measured(run)
    yield _row(whole, whole, None)
    for share in SHARES:
        # The model is no smaller than the share says, and all of it fits under a limit of all of it.
        wanted_mib = share * whole["weight_bytes"] / MIB
        limit_mib = math.floor(wanted_mib) if share < 1 else math.ceil(wanted_mib) + 1
        yield _row(measured(run._replace(limit_mib=limit_mib)), whole, limit_mib)


def _row(got: dict[str, Any], whole: dict[str, Any], limit_mib: int | None) -> dict[str, Any]:
    tokens = sum(map(len, got["tokens"]))
    return {
        "limit_mib": limit_mib,
        "model_mib": round(whole["weight_bytes"] / MIB, 1),
        "model_over_limit": None if limit_mib is None else round(whole["weight_bytes"] / MIB / limit_mib, 2),
        "equal": got["tokens"] == whole["tokens"],
        "tokens_per_s": round(tokens / got["seconds"], 1),
        "slow_down": round(got["seconds"] / whole["seconds"], 2),
        # What the process took at most beyond the libraries it had loaded before it had a model.
        "peak_mib": round((got["peak_bytes"] - got["before_bytes"]) / MIB, 1),
        "libraries_mib": round(got["before_bytes"] / MIB, 1),
        **_store_columns(got["store"], tokens),
    }


def _store_columns(figures: dict[str, Any] | None, tokens: int) -> dict[str, float | None]:
    names = ("resident_experts", "hit_rate", "late_rate", "mib_read_per_token", "wait_ms_per_token")
    if figures is None:
        return dict.fromkeys(names)
    store = StoreFigures(**figures)
    needs = store.hits + store.late + store.misses
    shares = (store.slots / store.experts, store.hits / needs, store.late / needs)
    spent = (store.bytes_read / tokens / MIB, store.wait_ms / tokens)
    return dict(zip(names, (round(n, 3) for n in (*shares, *spent)), strict=True))


def measured(run: StoreRun) -> dict[str, Any]:
    """What `_measure` finds, in a process of its own: its peak of memory is that of this run."""
    command = [sys.executable, "-m", "benchmarks.store", "--run", json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_S)
    if done.returncode:
        raise RuntimeError(f"a measuring process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _measure(run: StoreRun) -> dict[str, Any]:
    quiet()
    torch.set_num_threads(1)
    limits = Limits(slots=run.batch, chunk=256, tokens=512)
    settings = EngineSettings(
        dtype=run.dtype, kv_memory_mib=KV_MIB, threads=THREADS, step="native", limits=limits,
        memory_limit_mib=run.limit_mib, store_folder=run.store_folder,
    )  # fmt: skip
    prompts = _prompts(Path(run.folder), run.batch)
    before_bytes = resident_bytes()
    with Engine.from_folder(Path(run.folder), settings) as engine:
        assert isinstance(engine.step, NativeStep)
        started_s = time.perf_counter()
        done = engine.generate([Request(prompt, run.new_tokens) for prompt in prompts])
        seconds = time.perf_counter() - started_s
        assert engine.scheduler.tally.preempted == 0
        return {
            "tokens": [completion.tokens for completion in done],
            "prompts": prompts,
            "seconds": seconds,
            "store": None if engine.store is None else engine.store._asdict(),
            "weight_bytes": engine.step.weight_bytes,
            "before_bytes": before_bytes,
            "peak_bytes": peak_resident_bytes(),
        }


def _prompts(folder: Path, count: int) -> list[tuple[int, ...]]:
    """Passages of the standard library's sources, which the trained model has read; bytes for one without words."""
    text = inspect.getsource(textwrap)
    if (folder / "tokenizer.json").exists():
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    else:
        ids = list(text.encode())
    return [tuple(ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS]) for i in range(count)]


def _random_model(folder: Path, quick: bool) -> Path:
    config = presets()["small"].config
    config.update({"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4 if quick else 12})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


COLUMNS = (
    "model", "weights", "batch", "model_mib", "limit_mib", "model_over_limit", "peak_mib", "equal", "tokens_per_s",
    "slow_down", "hit_rate", "late_rate", "mib_read_per_token", "wait_ms_per_token",
)  # fmt: skip


@fails_clearly
def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="where the rows are written")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer tokens and layers")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="of the model that tells hit rates")] = None,
    run: Annotated[str | None, typer.Option(hidden=True, help="what one process measures")] = None,
) -> None:
    """How fast, how large, and how often the experts needed are there."""
    if run is not None:
        typer.echo(json.dumps(_measure(StoreRun(*json.loads(run)))))
        return
    require_json_file(json_file)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="anabranch-store-") as folder:
        for row in bench_store(steps or (40 if quick else 300), quick, Path(folder)):
            rows.append(row)
            # After each run: an interruption keeps what was measured.
            write_results(json_file, rows)
    show_rows(rows, COLUMNS)
    raise typer.Exit(0 if all(row["equal"] for row in rows) else FAILED)


if __name__ == "__main__":
    typer.run(main)
