"""Setups as columns of numbers, so that one pass of numpy prices many of them.

Axes: N setups, L levels of the network, innermost first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.setup import Setup, Software
from anabranch.hardware.instance import Cluster
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape

Column = NDArray[np.float64]
LEVELS = 4  # of a network: three inside the widest scale-up domain of the catalog, and the scale-out network


class ModelColumns(NamedTuple):
    """Of the model. FLOPs are forward, of a token; parameters and numbers are counts."""

    projections: Column
    attention: Column
    dense: Column
    experts: Column
    shared: Column
    head: Column
    hidden: Column
    layers: Column
    moe_layers: Column
    top_k: Column
    expert_count: Column
    unit_numbers: Column  # activations inside feed-forwards, a token, all layers
    row_numbers: Column  # hidden numbers moved a token to and from experts, all layers
    kv_numbers: Column
    vocab: Column
    dense_params: Column  # all but experts, embedding and head
    table_params: Column  # embedding and head
    expert_params: Column  # of all experts in all layers


class ChipColumns(NamedTuple):
    """Of the cluster. Peaks in FLOP/s, memory and links in bytes/s; level_chips 0 pads levels there are not."""

    peak: Column
    wide_peak: Column
    memory: Column
    level_chips_NL: Column
    level_bytes_NL: Column
    level_exchange_NL: Column


class LayoutColumns(NamedTuple):
    """Of the layout, as whole numbers. 0 or 1: `full` and `selective` (recomputation), `divided` (the optimizer's
    state, over dp ranks) and `fsdp` (parameters and gradients too)."""

    tp: Column
    pp: Column
    vp: Column
    ep: Column
    etp: Column
    cp: Column
    dp: Column
    micro_batch: Column
    global_batch: Column
    seq_len: Column
    full: Column
    selective: Column
    divided: Column
    fsdp: Column

    @property
    def chips(self) -> Column:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def edp(self) -> Column:
        return np.maximum(1.0, self.chips / (self.pp * self.ep * self.etp))

    @property
    def micro_batches(self) -> Column:
        return self.global_batch / (self.dp * self.micro_batch)


class SoftwareColumns(NamedTuple):
    """Traits as 0 or 1."""

    fp8: Column
    fp4: Column
    deduplicated: Column
    overlap: Column
    graphs: Column
    async_tp: Column
    adapters: Column


@dataclass(frozen=True)
class Columns:
    """N setups. Columns of length 1 stand for all of them."""

    model: ModelColumns
    chip: ChipColumns
    layout: LayoutColumns
    software: SoftwareColumns
    skew: Column


def model_values(shape: ModelShape, seq_len: int) -> ModelColumns:
    """One row of `ModelColumns`; multi-token-prediction modules are spread over the parts they consist of."""
    flops, parts = shape.forward_flops(seq_len), shape.params_by_part
    experts, width = shape.experts, shape.dense.width if shape.dense else 0
    # A prediction module is one more layer and one more head.
    more = 1.0 + shape.mtp / shape.layers
    rows = shape.moe_layers * experts.top_k if experts else 0
    units = shape.dense_layers * width
    if experts:
        units += rows * experts.width + shape.moe_layers * experts.shared_width
    values = (
        flops.projections * more, flops.attention * more, flops.dense,
        flops.experts * more, (flops.shared + flops.router) * more, flops.head * (1 + shape.mtp),
        shape.hidden, shape.layers + shape.mtp, shape.moe_layers + (shape.mtp if experts else 0),
        experts.top_k if experts else 0, experts.count if experts else 0,
        units * more, rows * shape.hidden * more, shape.attention.kv_numbers, shape.vocab,
        parts.attention + parts.dense + parts.shared + parts.router + parts.norms + parts.positions
        + (parts.mtp if not experts else 0),
        parts.embedding + (parts.head or 0), parts.experts + (parts.mtp if experts else 0),
    )  # fmt: skip
    return ModelColumns(*(np.array([float(value)]) for value in values))


@lru_cache(maxsize=64)
def _levels(cluster: Cluster) -> tuple[list[float], list[float], list[float]]:
    links, out = cluster.instance.scale_up, cluster.instance.scale_out_gb_per_s
    chips = [float(link.chips) for link in links] + ([np.inf] if out else [])
    own = [link.gb_per_s.mid * 1e9 for link in links] + ([out.mid * 1e9] if out else [])
    every = [link.all_to_all_gb_per_s.mid * 1e9 for link in links] + own[len(links) :]
    assert len(own) <= LEVELS, "the catalog has a network of more levels than columns hold"
    pad = LEVELS - len(own)
    return chips + [0.0] * pad, own + [np.inf] * pad, every + [np.inf] * pad


def chip_values(cluster: Cluster, precision: str) -> ChipColumns:
    """One row of `ChipColumns`. Raises ConfigError where the chip has no such precision."""
    chip, (sizes, own, every) = cluster.chip, _levels(cluster)
    wide = "bf16" if "bf16" in chip.precisions else precision
    return ChipColumns(
        np.array([chip.peak_tflops(precision).mid * 1e12]),
        np.array([chip.peak_tflops(wide).mid * 1e12]),
        np.array([chip.memory_gb_per_s.mid * 1e9]),
        np.array([sizes]),
        np.array([own]),
        np.array([every]),
    )


def software_values(software: Software, precision: str) -> SoftwareColumns:
    """One row of `SoftwareColumns`."""
    traits = (
        precision == "fp8", precision == "fp4", software.dispatcher == "deduplicated",
        software.expert_overlap, software.graphs, software.async_tp, software.adapters,
    )  # fmt: skip
    return SoftwareColumns(*(np.array([float(trait)]) for trait in traits))


def columns_of(setups: Sequence[Setup]) -> Columns:
    """One row a setup. Raises ConfigError where a chip lacks the layout's precision."""
    models = [model_values(setup.shape, setup.layout.seq_len) for setup in setups]
    chips = [chip_values(setup.cluster, setup.layout.precision) for setup in setups]
    traits = [software_values(setup.software, setup.layout.precision) for setup in setups]
    return Columns(
        ModelColumns(*(np.concatenate(column) for column in zip(*models, strict=True))),
        ChipColumns(*(np.concatenate(column) for column in zip(*chips, strict=True))),
        layout_columns([setup.layout for setup in setups]),
        SoftwareColumns(*(np.concatenate(column) for column in zip(*traits, strict=True))),
        np.array([setup.skew for setup in setups]),
    )


def layout_columns(layouts: Sequence[Layout]) -> LayoutColumns:
    """One row a layout."""
    return LayoutColumns(*(np.array(column) for column in zip(*map(_layout_values, layouts), strict=True)))


def _layout_values(layout: Layout) -> tuple[float, ...]:
    numbers = (
        layout.tp, layout.pp, layout.vp, layout.ep, layout.etp, layout.cp, layout.dp,
        layout.micro_batch, layout.global_batch, layout.seq_len,
        layout.recompute == "full", layout.recompute == "selective", layout.shard != "none", layout.shard == "full",
    )  # fmt: skip
    return tuple(float(number) for number in numbers)
