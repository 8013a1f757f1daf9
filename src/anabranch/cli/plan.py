"""`anabranch plan`: what a training run will take, before it is paid for. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import typer

from anabranch.cli.fail import fails_clearly
from anabranch.cli.plan_display import show
from anabranch.costs.training.calibration import SHIPPED, load_calibration
from anabranch.costs.training.setup import Software
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import Catalog, load_catalog
from anabranch.hardware.instance import Cluster
from anabranch.hardware.price import BASES
from anabranch.planner.answer import Question, answer
from anabranch.planner.launch import train_settings, write_launch
from anabranch.planner.outcome import Terms
from anabranch.planner.report import write_report
from anabranch.planner.search import Request
from anabranch.planner.space import divisors
from anabranch.simulator.histogram import natural_histogram, read_histogram
from anabranch.simulator.skew import Policy, rank_skew
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import Layout, Precision
from anabranch.workload.shape import ModelShape

MODEL, TOKENS, SEQ_LEN, NODES = "Qwen3-30B-A3B", "1e12", 4096, 4
LEAST_UTILISATION = 0.001
STEP_TOKENS = 4 * 2**20  # of a step where no batch is given, as models of tens of billions are trained
# The trainer that published runs of a family of chips have used, and of all others.
SOFTWARE = {"trainium": "nxd"}
USUAL_SOFTWARE = "megatron-bridge"
OWN_SOFTWARE = "anabranch"

Model = Annotated[str, typer.Option(help="a shipped shape, a config.json, or a folder with one")]
ClusterNames = Annotated[
    list[str] | None,
    typer.Option("--cluster", help="instance and nodes, trn2.48xlarge:4; more to set beside it"),
]
Tokens = Annotated[str | None, typer.Option(help=f"of the whole run, such as {TOKENS}, which is the default")]
SeqLen = Annotated[int | None, typer.Option(help=f"tokens of a sequence [default: {SEQ_LEN}]")]
GlobalBatch = Annotated[int | None, typer.Option(help="sequences of a step [default: about 4 M tokens]")]
PrecisionName = Annotated[str | None, typer.Option(help="bf16, fp8, fp4, fp32 [default: bf16 where it is]")]
Basis = Annotated[str | None, typer.Option(help=f"price: {', '.join(BASES)} [default: the first known]")]
Utilisation = Annotated[float | None, typer.Option(help="hours of the run over hours paid for [default: 1]")]
PolicyName = Annotated[str, typer.Option(help="who computes which rows: static, bounded, exact, ...")]
HistogramFile = Annotated[Path | None, typer.Option(help="rows of each expert: JSON, or a trace (.npz)")]
CatalogFile = Annotated[Path | None, typer.Option(help="your own figures, TOML, over the shipped ones")]
CalibrationFile = Annotated[Path, typer.Option(help="what `anabranch calibrate` wrote", show_default=False)]
Compare = Annotated[tuple[str, str] | None, typer.Option(help="what the first saves over the second")]
Emit = Annotated[Path | None, typer.Option(help="write a plan that `anabranch train --plan` can run")]
Html = Annotated[Path | None, typer.Option(help="write a report with plots, one HTML file")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the answer as JSON; - for stdout")]
Explain = Annotated[bool, typer.Option("--explain", help="every assumption, with its source")]


@fails_clearly
def plan(
    model: Model = MODEL,
    cluster: ClusterNames = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    global_batch: GlobalBatch = None,
    precision: PrecisionName = None,
    basis: Basis = None,
    utilisation: Utilisation = None,
    policy: PolicyName = "static",
    histogram: HistogramFile = None,
    catalog: CatalogFile = None,
    calibration: CalibrationFile = SHIPPED,
    compare: Compare = None,
    emit: Emit = None,
    html: Html = None,
    json_file: JsonFile = None,
    explain: Explain = False,
) -> None:
    """The fastest layout that fits, with its time, memory, dollars and energy, each with intervals."""
    given = {"tokens": tokens, "seq_len": seq_len, "global_batch": global_batch, "precision": precision,
             "basis": basis, "utilisation": utilisation}  # fmt: skip
    known = load_catalog(catalog)
    length, placed = SEQ_LEN if seq_len is None else seq_len, Policy(policy)
    work = Work(read_shape(model), _number(tokens or TOKENS), length, precision, placed, emit is not None)
    names, pair = _names(cluster, compare)
    clusters, compared = [known.cluster(name) for name in names], [known.cluster(name) for name in pair]
    skew, origin = _skew(work, [*clusters, *compared], histogram)
    batch = _usual_batch(clusters[0].chips, work.seq_len) if global_batch is None else global_batch
    first, *others = (work.on(one, batch, skew) for one in [*clusters, *compared])
    question = Question(
        model, first, _terms(known, basis, utilisation), origin,
        frozenset(name for name, value in given.items() if value is not None),
        tuple(others[: len(clusters) - 1]), (others[-2], others[-1]) if compared else None,
    )  # fmt: skip
    found = answer(question, load_calibration(calibration))
    if emit is not None:
        layout, steps = found.found.best.layout, found.found.request.steps
        write_launch(emit, train_settings(layout, _here(model), steps, policy), found.to_dict())
    if html is not None:
        write_report(found, html)
    if json_file is not None:
        _write(json_file, json.dumps(found.to_dict(), indent=1))
    if json_file != Path("-"):
        show(found, explain)


class Work(NamedTuple):
    """What is to be computed, wherever."""

    shape: ModelShape
    tokens: float
    seq_len: int
    precision: str | None
    policy: Policy
    by_train: bool

    def on(self, cluster: Cluster, batch: int, skew: dict[int, float]) -> Request:
        chip = cluster.chip
        usual = "bf16" if "bf16" in chip.precisions else chip.precisions[0]
        trainer = OWN_SOFTWARE if self.by_train else SOFTWARE.get(chip.family, USUAL_SOFTWARE)
        asked = usual if self.precision is None else self.precision
        precision = cast("Precision", asked)  # the request refuses what is none
        return Request(
            self.shape, cluster, self.tokens, self.seq_len, batch, precision, Software(family=trainer), skew,
            guest_slots=0 if self.policy.planner == "static" else self.policy.slots, by_train=self.by_train,
        )  # fmt: skip


def _names(cluster: list[str] | None, compare: tuple[str, str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Of the clusters to plan for, and of the two to compare; those without a number of nodes get the first one's."""
    if not cluster and compare is None:
        raise ConfigError("name an instance and how many, trn2.48xlarge:4", setting="cluster")
    _, colon, nodes = (cluster or [""])[0].partition(":")
    pair = tuple(name if ":" in name else f"{name}:{nodes if colon else NODES}" for name in compare or ())
    return cluster or [pair[0]], pair


def _number(tokens: str) -> float:
    try:
        return float(tokens)
    except ValueError:
        raise ConfigError(f"{tokens!r} is no number, such as {TOKENS}", setting="tokens") from None


def _usual_batch(chips: int, seq_len: int) -> int:
    """Sequences of about `STEP_TOKENS`, as many for every chip."""
    return max(1, round(STEP_TOKENS / max(1, seq_len) / chips)) * chips


def _terms(known: Catalog, basis: str | None, utilisation: float | None) -> Terms:
    occupancy = 1.0 if utilisation is None else utilisation
    if not LEAST_UTILISATION <= occupancy <= 1.0:
        raise ConfigError(f"{occupancy:g} must lie in {LEAST_UTILISATION:g} to 1", setting="utilisation")
    return Terms(known.figure("pue"), known.figure("electricity"), basis, occupancy)


def _skew(work: Work, clusters: list[Cluster], file: Path | None) -> tuple[dict[int, float], str]:
    """Max over mean by expert-parallel degree, and where it is from."""
    experts, chips = work.shape.experts, max(cluster.chips for cluster in clusters)
    work.policy.build()  # says what is wrong with its name,
    Layout(work.seq_len, 1)  # and this with the length
    if experts is None:
        return {1: 1.0}, "the model has no experts"
    popularity = natural_histogram(experts.count) if file is None else read_histogram(file)
    degrees = [degree for degree in divisors(experts.count) if degree <= chips]
    tokens = max(1, work.seq_len)  # of a micro-batch of one sequence
    skew = rank_skew(
        degrees, experts=experts.count, top_k=experts.top_k, tokens=tokens, policy=work.policy, histogram=popularity
    )  # fmt: skip
    origin = f"{work.policy.planner} placement of {popularity.resampled(experts.count).source}"
    static = work.policy.planner == "static"
    return skew, origin if static else f"{origin}; guests' weights are not priced, `anabranch simulate` does"


def _here(model: str) -> str:
    """A file or folder by its full path: a plan may be used elsewhere."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def _write(file: Path, text: str) -> None:
    if file == Path("-"):
        typer.echo(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}", setting="json") from error
