"""`anabranch bench`: what is measured, and how its figures are shown."""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.bench_balance import BalanceBench
from anabranch.cli.bench_codecs import RUNS, about, bench_codecs, summary, whole_seeds
from anabranch.cli.bench_generate import (
    Model,
    about_generate,
    bench_generate,
    held_rows,
    line_of,
    require_vllm,
    train_small,
)
from anabranch.cli.bench_kv import bench_kv, train_tiny
from anabranch.cli.bench_memory import memory
from anabranch.cli.bench_planner import bench_planner
from anabranch.cli.bench_validation import validation
from anabranch.cli.cluster_book import Book
from anabranch.cli.cluster_grid import MODEL, Measuring, cases_of_model, full_grid, measure, quick_grid
from anabranch.cli.cluster_verdict import verdict
from anabranch.cli.fail import fails_clearly
from anabranch.cli.generate_cases import (
    QUICK_S,
    RANDOM,
    TIMED_S,
    TRAINED,
    full_cases,
    llama_cases,
    quick_cases,
    vllm_cases,
    write_model,
)
from anabranch.cli.launch import launch
from anabranch.cli.llama_decode import have_llama
from anabranch.cli.process import refuse_torchrun, say, usable_cores
from anabranch.cli.results import require_json_file, show_rows, write_results
from anabranch.cli.skew_grid import skew
from anabranch.errors import ConfigError, TraceError
from anabranch.training.config import DTYPES
from anabranch.transport.choose import require_transport
from anabranch.workload.trace import load_trace, natural_trace

bench = typer.Typer(
    help="Measure; every figure in docs/ comes from here.", no_args_is_help=True, add_completion=False
)
bench.command()(memory)
bench.command()(validation)

GENERATE_COLUMNS = (
    "model", "engine", "dtype", "kv_dtype", "batch", "samples", "prompt_tokens", "new_tokens", "tokens_per_s", "spread",
    "roof_fraction", "bound_by", "bytes_per_token", "resident_mib",
)  # fmt: skip

JsonFile = Annotated[Path | None, typer.Option("--json", help="write {machine, rows} to this file")]


@bench.command()
@fails_clearly
def planner(
    rounds: Annotated[int, typer.Option(min=1, help="plans timed per case")] = 200, json_file: JsonFile = None
) -> None:
    """Time the planners on skewed loads, on one thread."""
    require_json_file(json_file)
    rows = bench_planner(rounds)
    columns = ("planner", "ranks", "experts", "plan_us_median", "plan_us_p90", "assign_us_median", "guests",
               "max_mean_before", "max_mean_after")  # fmt: skip
    write_results(json_file, rows)
    show_rows(rows, columns)


@bench.command()
@fails_clearly
def balance(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option(help="a narrower layer and fewer rounds: under 3 minutes")] = False,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="group sizes [default: 2 and 4]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds per policy")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    transport: Annotated[str, typer.Option(help="of our policies")] = "dedup",
    max_mean: Annotated[float, typer.Option(min=1.0, help="rank max/mean of the stress workloads")] = 1.5,
    trace: Annotated[
        Path | None, typer.Option(help="a trace with token ids [default: the one that ships]")
    ] = None,
) -> None:
    """One MoE layer, forward and backward, under every policy and workload, interleaved in one run."""
    require_json_file(json_file)
    size = BalanceBench(
        2,
        rounds=rounds,
        dtype=dtype,
        transport=transport,
        max_mean=max_mean,
        trace=str(trace or natural_trace()),
    )
    _check(size, max(ranks or (2,)))
    if quick:
        size = replace(size, hidden=192, width=384, rounds=5)
    rows: list[dict[str, Any]] = []
    for count in ranks or (2, 4):
        # More ranks than cores share them: fewer tokens a rank keep the work, and the run, the same size.
        tokens = size.tokens * 2 // max(2, count)
        rows += launch("bench_balance", asdict(replace(size, ranks=count, tokens=tokens)), count)["rows"]
    columns = ("ranks", "workload", "policy", "max_mean_before", "max_mean_after", "guests", "step_ms_median",
               "step_ms_spread", "speedup_vs_transformers", "percent_of_ideal")  # fmt: skip
    write_results(json_file, rows)
    show_rows(rows, columns)


@bench.command()
@fails_clearly
def cluster(
    json_file: JsonFile = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="under 5 minutes: one topology, three workloads")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="the most rounds of a cell [default: 8, 5 with --quick]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="tokens of each of 4 ranks [default: 512, 256 with --quick]")
    ] = None,
    max_mean: Annotated[float, typer.Option(min=1.0, help="rank max/mean of the stress workloads")] = 2.0,
    topology: Annotated[list[str] | None, typer.Option(help="only this one, such as 2x2; repeatable")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="show what auto chooses from, for one layer")
    ] = False,
) -> None:
    """A whole model's step under every policy, on emulated nodes with shaped links; as root.

    Cells that FILE of --json holds already are not measured again: an interrupted grid goes on where it was.
    """
    refuse_torchrun("the benchmark", "lab")
    require_json_file(json_file)
    grid = (quick_grid if quick else full_grid)(usable_cores()).only(topology or [])
    tokens, rounds = tokens or (256 if quick else 512), rounds or (5 if quick else 8)
    cases = cases_of_model(tokens, max_mean, natural_trace(MODEL))
    how = Measuring(rounds, slots=4, epsilon=0.05, explain=explain)
    settings = {
        "tokens": tokens, "rounds": rounds, "max_mean": max_mean, "model": MODEL, "slots": how.slots,
        "epsilon": how.epsilon,
    }  # fmt: skip
    book = Book(json_file, settings)
    wanted = len(grid.labs) * len(grid.workloads)
    if held := wanted - sum(len(grid.missing(spec, book)) for spec in grid.labs):
        typer.echo(f"{held} of {wanted} cells are in {json_file} already")
    measure(grid, cases, how, book)
    typer.echo(verdict(book.rows).text())


bench.command()(skew)


@bench.command()
@fails_clearly
def codecs(
    json_file: JsonFile = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of each run")] = 200,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="trainings with each codec")] = 5,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="trainings at a time, of two cores each")] = 1,
) -> None:
    """Train with each wire codec: its effect on the final validation loss, beside that of rounding alone."""
    refuse_torchrun("the benchmark", "jobs")
    require_json_file(json_file)
    rows = whole_seeds(json_file, steps)
    left, common = range(len(rows) // len(RUNS), seeds), about(steps)
    with tempfile.TemporaryDirectory(prefix="anabranch-codecs-") as folder:
        for row in bench_codecs(steps, left, Path(folder), jobs):
            rows.append(row)
            # After each run: an interruption keeps what was measured, and the next call goes on with the next seed.
            write_results(json_file, rows, common, summary=summary(rows))
    columns = ("transport", "dispatch_wire", "combine_wire", "seeds", "mean_change_percent", "spread_percent",
               "margin_percent", "gradient_relative_error")  # fmt: skip
    show_rows(summary(rows), columns)


@bench.command()
@fails_clearly
def generate(
    json_file: JsonFile = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="under 4 minutes: one model, the main sizes")
    ] = False,
    trained: Annotated[
        Path | None, typer.Option(help="where the trained preset `small` is kept [default: trained anew]")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="a Python that has vLLM for CPU, to compare with")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="only this engine; repeatable")] = None,
) -> None:
    """Decode by each engine, beside this machine's roofs, measured in the same run.

    llama.cpp is measured where `llama_cpp` and `gguf` import. Cases that FILE of --json holds are not measured again.
    """
    require_json_file(json_file)
    require_vllm(vllm_python)
    cases = quick_cases() if quick else full_cases()
    theirs = vllm_cases(cases) if vllm_python is not None else []
    cases += theirs + (llama_cases(cases) if have_llama() else [])
    if unknown := set(engine or ()) - {case.engine for case in cases}:
        known = ", ".join(dict.fromkeys(case.engine for case in cases))
        raise ConfigError(f"{sorted(unknown)[0]!r} is not measured; choose of {known}", setting="engine")
    cases = [case for case in cases if case.engine in (engine or (case.engine,))]
    rows, common = held_rows(json_file, quick), about_generate(quick)
    with tempfile.TemporaryDirectory(prefix="anabranch-generate-") as name:
        folder = Path(name)
        write_model(folder / RANDOM)
        models = [Model(RANDOM, folder / RANDOM)]
        if not quick:
            models.append(Model(TRAINED, train_small(trained or folder)))
        for row in bench_generate(models, cases, vllm_python, tuple(rows), QUICK_S if quick else TIMED_S):
            rows.append(row)
            say(line_of(row))
            # After each case: an interruption keeps what was measured, and the next call goes on from there.
            write_results(json_file, rows, common)
    show_rows(rows, GENERATE_COLUMNS)


@bench.command()
@fails_clearly
def kv(
    model: Annotated[
        Path | None, typer.Argument(help="folder of a trained model [default: `tiny`, trained now]")
    ] = None,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer steps and chains: under 3 minutes")] = False,
    tokens: Annotated[int, typer.Option(min=640, help="tokens of a chain")] = 1024,
) -> None:
    """Each KV policy while decoding held-out text: KL to full KV, needles, bytes, chains, speed."""
    require_json_file(json_file)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="anabranch-kv-bench-") as folder:
        trained = model or train_tiny(60 if quick else 900, Path(folder) / "trained", tokens)
        for row in bench_kv(trained, tokens, 4 if quick else 16):
            rows.append(row)
            # After each policy: an interruption keeps what was measured.
            write_results(json_file, rows)
    columns = ("policy", "kl", "kl_late", "same_best_token", "nll", "needles", "needles_found", "needle_nll",
               "kv_bytes_per_token", "chains_4k_in_2_gib", "tokens_per_s")  # fmt: skip
    show_rows(rows, columns)


def _check(size: BalanceBench, ranks: int) -> None:
    """Raise ConfigError or TraceError for what cannot be measured, before a process is started."""
    refuse_torchrun("the benchmark", "ranks")
    require_transport(size.transport)
    if size.dtype not in DTYPES:
        raise ConfigError(f"{size.dtype!r} is unknown; use {' or '.join(DTYPES)}", setting="dtype")
    if ranks > size.experts:
        raise ConfigError(f"{ranks} would share {size.experts} experts; use at most that", setting="ranks")
    trace = load_trace(Path(size.trace))
    if trace.ids is None or not len(trace.ids):
        raise TraceError(f"{size.trace} has no token ids; record it with --ids", setting="trace")
    told = {"experts": size.experts, "top_k": size.top_k}
    found = {name: trace.metadata[name] for name in told}
    if found != told:
        raise TraceError(
            f"{size.trace} is of {found['experts']} experts, {found['top_k']} a token, the measured layer of "
            f"{size.experts}, {size.top_k} a token; record one of the preset tiny",
            setting="trace",
        )
