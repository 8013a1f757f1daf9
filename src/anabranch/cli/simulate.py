"""`anabranch simulate`: one training step under natural skew, by every policy, on hardware that is not at hand.

Imports no torch.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anabranch.cli import plan
from anabranch.cli.fail import fails_clearly
from anabranch.cli.results import require_json_file
from anabranch.costs.training.calibration import load_calibration
from anabranch.costs.training.setup import Setup, Software
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.instance import Cluster
from anabranch.planner.space import divisors
from anabranch.simulator.histogram import natural_histogram, read_histogram
from anabranch.simulator.skew import POLICIES, Group, Placed, Policy, mean_skew, place
from anabranch.simulator.slowdown import PublishedPrices
from anabranch.simulator.timeline import Timeline
from anabranch.workload.hf_config import read_shape
from anabranch.workload.layout import CHOICES, Layout
from anabranch.workload.shape import ModelShape

FIELDS = [field.name for field in dataclasses.fields(Layout)]
SLOTS = 4  # the most guests a rank hosts


ClusterName = Annotated[str, typer.Option("--cluster", help="an instance and how many, trn2.48xlarge:4")]
LayoutText = Annotated[
    str, typer.Option(help=f"such as ep=16,pp=2; of {', '.join(FIELDS)}; dp is what is left of the chips")
]
Policies = Annotated[
    list[str] | None, typer.Option(help=f"of {', '.join(POLICIES)}; repeatable [default: all]")
]
Trace = Annotated[Path | None, typer.Option(help="write the first policy's step for chrome://tracing")]
Micro = Annotated[int | None, typer.Option(min=1, help="to replay in --trace [default: the step's]")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write everything to this file")]


@fails_clearly
def simulate(
    model: plan.Model, cluster: ClusterName, layout: LayoutText = "", policy: Policies = None,
    histogram: plan.HistogramFile = None, trace: Trace = None, micro_batches: Micro = None,
    catalog: plan.CatalogFile = None, json_file: JsonFile = None,
) -> None:  # fmt: skip
    """What natural skew costs a step, and what each policy makes of it: rows, guests, waiting, seconds."""
    require_json_file(json_file)
    require_json_file(trace, "trace")
    shape, hardware = read_shape(model), load_catalog(catalog).cluster(cluster)
    chosen = _layout(layout, shape, hardware)
    software = Software(plan.SOFTWARE.get(hardware.chip.family, plan.USUAL_SOFTWARE))
    prices = PublishedPrices(Setup(shape, hardware, chosen, software), load_calibration())
    group, experts = Group.of(shape, chosen), shape.experts.count if shape.experts else 0
    popularity = (read_histogram(histogram) if histogram else natural_histogram(experts)).resampled(experts)
    policies = [Policy(name, slots=SLOTS, min_rows=prices.guest_rows) for name in policy or POLICIES]
    placed = {one.planner: place(popularity, group, one) for one in policies}
    found: dict[str, Any] = {
        "model": model, "cluster": str(cluster), "layout": dataclasses.asdict(chosen), "popularity": popularity.source,
        "tokens_per_rank": group.tokens, "balanced_step_s": prices.balanced_s(group), "guest_rows": prices.guest_rows,
        "policies": [_result(name, layers, prices, group) for name, layers in placed.items()],
    }  # fmt: skip
    _show(found)
    for file in filter(None, (trace, json_file)):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    if trace is not None:
        timeline = Timeline(prices, placed[policies[0].planner], micro_batches)
        timeline.write_trace(trace)
        found["replayed_step_s"] = timeline.replay.makespan_s
        typer.echo(f"{trace}: {policies[0].planner}, {timeline.replay.makespan_s:.3f} s replayed")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


def _result(name: str, placed: list[Placed], prices: PublishedPrices, group: Group) -> dict[str, Any]:
    """One policy in all layers."""
    step_s = prices.step_s(placed, name)
    return {
        "policy": name,
        "max_mean": mean_skew(placed),
        "step_s": step_s,
        "throughput": prices.balanced_s(group) / step_s,
        "waiting_s": prices.waiting_s(placed),
        "layers": [
            {
                "layer": layer.layer,
                "rows": layer.rows_DR.mean(axis=0).round(1).tolist(),
                "max_mean": layer.max_mean,
                "guests": layer.guests,
                "guest_bytes": layer.guests * prices.expert_bytes,
                "busiest_rank_guest_bytes": layer.lent * prices.expert_bytes,
                "moved": layer.moved,
            }
            for layer in placed
        ],
    }


def _layout(text: str, shape: ModelShape, cluster: Cluster) -> Layout:
    """Of "ep=16,pp=2". Not given: plan's usual length and about its tokens of a step, experts over as many chips as
    divide them in a domain, dp what is left of the chips."""
    fields: dict[str, Any] = {"seq_len": plan.SEQ_LEN}
    given = set[str]()
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if name not in FIELDS or not value:
            raise ConfigError(f"{part!r}: write fields of {', '.join(FIELDS)}, ep=16,pp=2", setting="layout")
        if name not in CHOICES and not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise ConfigError(f"{value!r} is no whole number", setting=f"layout.{name}")
        if name in given:
            raise ConfigError("given twice", setting=f"layout.{name}")
        given.add(name)
        fields[name] = value if name in CHOICES else int(value)
    tp, pp, cp, etp, micro_batch = (
        max(1, fields.get(n, 1)) for n in ("tp", "pp", "cp", "etp", "micro_batch")
    )
    stage, count = max(1, cluster.chips // pp // etp), shape.experts.count if shape.experts else 1
    fields.setdefault("dp", max(1, cluster.chips // (tp * pp * cp)))
    fields.setdefault("ep", max(d for d in divisors(count) if d <= cluster.domain and stage % d == 0))
    sequences = max(1, fields["dp"]) * micro_batch
    whole = plan.STEP_TOKENS / max(1, fields["seq_len"]) / sequences
    fields.setdefault("global_batch", max(1, round(whole)) * sequences)
    made = Layout(**fields)
    made.check(shape, cluster.chips)
    return made


def _show(found: dict[str, Any]) -> None:
    balanced_s = found["balanced_step_s"]
    table = Table(title=f"{found['model']} on {found['cluster']}: balanced step {balanced_s:.3f} s")
    for column in ("policy", "max/mean", "worst layer", "guests", "moved", "MB a rank", "step s", "of balanced",
                   "waiting s"):  # fmt: skip
        table.add_column(column, justify="left" if column == "policy" else "right")
    for one in found["policies"]:
        of = {key: [layer[key] for layer in one["layers"]] for key in one["layers"][0]}
        layers = len(of["layer"])
        table.add_row(
            one["policy"], f"{one['max_mean']:.3f}", f"{max(of['max_mean']):.3f}", f"{sum(of['guests']) / layers:.1f}",
            f"{sum(of['moved']) / layers:.1f}",
            f"{sum(of['busiest_rank_guest_bytes']) / layers / 1e6:.1f}", f"{one['step_s']:.3f}",
            f"{one['throughput']:.1%}", f"{one['waiting_s']:.3f}",
        )  # fmt: skip
    Console(width=None if os.isatty(1) else 120).print(table)
    typer.echo(
        f"Popularity: {found['popularity']}. A guest is worth its weights from {found['guest_rows']} rows on."
    )
