"""`anabranch bench memory`: predicted peaks beside those of real trainings, and beside published ones."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli.fail import fails_clearly
from anabranch.cli.launch import launch
from anabranch.cli.memory_rank import Measured, MemoryRun
from anabranch.cli.results import require_json_file, write_results
from anabranch.costs.training.columns import layout_columns
from anabranch.costs.training.memory import peak_memory
from anabranch.costs.training.memory_error import published_peak
from anabranch.costs.training.published import Published, read_published
from anabranch.costs.training.stacks import transformers_modules
from anabranch.costs.training.state import unbuilt_state_bytes
from anabranch.workload.hf_config import shape_from_config
from anabranch.workload.layout import Layout

UNTIED = ("tie_word_embeddings", False)
# Small experts of which a token takes many, and an odd number of everything that can be.
FINE = (("moe_intermediate_size", 64), ("num_experts", 32), ("num_experts_per_tok", 8))
ODD = (("num_experts", 7), ("moe_intermediate_size", 200), ("num_hidden_layers", 3))
EP2: dict[str, Any] = {"ranks": 2, "ep": 2}
RUNS = (
    MemoryRun("dense", "llama"),
    MemoryRun("dense, large vocabulary", "llama", batch=2, vocab=4096),
    MemoryRun("dense, autocast", "qwen3", dtype="bfloat16"),
    MemoryRun("dense, recompute", "qwen3", recompute=True, batch=8),
    MemoryRun("moe"),
    MemoryRun("moe, autocast, short", dtype="bfloat16", seq=128),
    MemoryRun("moe, recompute, 2 micro-batches", recompute=True, micro_batches=2),
    MemoryRun("dense, fsdp", "llama", ranks=2),
    MemoryRun("dense, fsdp, bf16, untied", "llama", ranks=2, dtype="bfloat16", sizes=(UNTIED,)),
    MemoryRun("moe, ep", **EP2),
    MemoryRun("moe, ep, long, bounded", **EP2, seq=512, planner="bounded"),
    MemoryRun("moe, ep, bf16, bounded", **EP2, dtype="bfloat16", planner="bounded"),
    MemoryRun("moe, ep, recompute", **EP2, recompute=True),
    MemoryRun("moe, ep, bf16, recompute, bounded", **EP2, dtype="bfloat16", recompute=True, planner="bounded"),
    MemoryRun("moe, ep, 2 micro-batches", **EP2, micro_batches=2),
    MemoryRun("moe, ep, fine experts, dedup", **EP2, vocab=2048, transport="dedup", sizes=FINE),
    MemoryRun("moe, ep, odd sizes, untied", **EP2, vocab=641, sizes=(*ODD, UNTIED)),
    MemoryRun("moe, 4 ranks, ep 2, odd sizes", ranks=4, ep=2, batch=2, vocab=641, sizes=ODD),
)  # fmt: skip

PARTS = ("peak", "state", "logits", "rest")


@fails_clearly
def memory(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write {rows, published, summary} to this file")
    ] = None,
) -> None:
    """Train small models on 1, 2 and 4 ranks; the peak of their tensors beside the predicted one."""
    require_json_file(json_file)
    rows, published = list[dict[str, Any]](), published_memory()
    for row in bench_memory():
        rows.append(row)
        # After each run: an interruption keeps what was measured.
        summary = {"runs": errors_of(rows), "published": errors_of(published)}
        write_results(json_file, rows, published=published, summary=summary)
    console = Console(width=None if os.isatty(1) else 140)
    console.print(
        _table("MB of tensors, measured / predicted", rows, ("run", *PARTS, "error_pct", "state_exact"))
    )
    columns = ("id", "software", "model", "chips", "peak", "error_pct")
    console.print(_table("Published, GB as allocators count, measured / predicted", published, columns))
    for name, errors in summary.items():
        typer.echo(
            f"{name}: {errors['count']}, error in the median {errors['median_pct']} %, at most {errors['max_pct']} %"
        )


def _table(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(*("{:.1f} / {:.1f}".format(*v) if isinstance(v, tuple) else str(v) for v in values))
    return table


def bench_memory(runs: Sequence[MemoryRun] = RUNS) -> Iterator[dict[str, Any]]:
    """A row a run, by the number of ranks as they are measured."""
    with tempfile.TemporaryDirectory(prefix="anabranch-memory-") as name:
        for ranks in sorted({run.ranks for run in runs}):
            some = [run for run in runs if run.ranks == ranks]
            for run in some:  # one process makes each text, before ranks read it
                run.text(Path(name))
            asked = {"folder": name, "runs": [asdict(run) for run in some]}
            measured = launch("memory", asked, ranks)["measured"]
            for run, values in zip(some, measured, strict=True):
                yield compared(run, Measured(**values))


def compared(run: MemoryRun, measured: Measured) -> dict[str, Any]:
    """(measured, predicted) megabytes of the peak and its parts. state: of weights and optimizer. rest: all but that
    and logits. state_exact: weights, gradients and optimizer's state to the byte."""
    shape, fp32 = shape_from_config(run.config.to_dict()), run.dtype == "float32"
    layout = Layout(
        run.seq, run.batch * run.micro_batches * run.ranks, run.batch, ep=run.ep, dp=run.ranks,
        recompute="full" if run.recompute else "none", precision="fp32" if fp32 else "bf16",
        shard="full" if run.ranks > 1 else "none",
    )  # fmt: skip
    stack = transformers_modules(shape, "fp32" if fp32 else "mixed" if run.ranks > 1 else "autocast")
    parts = peak_memory(
        shape, layout_columns([layout]), layout.precision, measured.rows, measured.guests, stack
    )
    state, total, logits = unbuilt_state_bytes(shape, layout), float(parts.total[0]), float(parts.logits[0])
    pairs = {
        "peak": (measured.peak, total),
        "state": (measured.weights + measured.optimizer, state.weights + state.optimizer),
        "logits": (measured.logits, logits),
    }
    rest = [pairs["peak"][i] - pairs["state"][i] - pairs["logits"][i] for i in (0, 1)]
    return {
        "run": run.name, "ranks": run.ranks, "rows_over_mean": round(measured.rows, 3),
        **{name: (_mega(a), _mega(b)) for name, (a, b) in {**pairs, "rest": rest}.items()},
        "error_pct": round(100.0 * (total / measured.peak - 1.0), 2),
        "state_exact": tuple(state) == (measured.weights, measured.gradients, measured.optimizer),
        "predicted": {name: _mega(float(part[0])) for name, part in parts._asdict().items()},
    }  # fmt: skip


def published_memory() -> list[dict[str, Any]]:
    """The published runs that state a peak, in gigabytes: as allocators count, of other frameworks."""
    return [_published(row, row.memory_gb) for row in read_published()[0] if row.memory_gb is not None]


def _published(row: Published, measured_gb: float) -> dict[str, Any]:
    shape, layout, family = row.setup.shape, row.setup.layout, row.setup.software.family
    total_gb = published_peak(row) / 1e9
    return {
        "id": row.id, "software": family, "model": shape.family, "chips": layout.chips,
        "peak": (round(measured_gb, 1), round(total_gb, 1)),
        "error_pct": round(100.0 * (total_gb / measured_gb - 1.0), 1),
    }  # fmt: skip


def errors_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of absolute errors, in percent."""
    errors = np.abs([row["error_pct"] for row in rows])
    return {
        "count": len(rows),
        "median_pct": round(float(np.median(errors)), 2),
        "max_pct": float(np.max(errors)),
    }


def _mega(size: float) -> float:
    return round(size / 1e6, 3)
