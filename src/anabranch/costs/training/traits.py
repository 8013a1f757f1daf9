"""What makes two setups alike: names, sizes and switches, as the residual's kernel compares them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.setup import Setup

# One unit of distance in log2 of a size: the kernel falls to exp(-1/2) there.
LAYOUT_SCALES = {
    "tp": 3.0, "pp": 3.0, "ep": 3.0, "cp": 2.0, "dp": 7.0, "micro_batch": 3.0, "micro_batches": 10.0,
    "seq_len": 2.5, "chips": 10.0, "bubble": 1.0,
}  # fmt: skip
SHAPE_SCALES = {"hidden": 0.7, "layers": 0.7, "experts": 1.5, "top_k": 1.5, "width": 1.0, "vocab": 2.0}


class Traits(NamedTuple):
    """Of N setups. Names are compared for equality, sizes (in units of their scales) and switches by distance."""

    source: NDArray[np.str_]
    software: NDArray[np.str_]
    chip: NDArray[np.str_]
    precision: NDArray[np.str_]
    layout_NA: NDArray[np.float64]
    shape_NB: NDArray[np.float64]
    switches_NC: NDArray[np.float64]


def traits_of(setups: Sequence[Setup]) -> Traits:
    """One row a setup."""
    return Traits(
        np.array([setup.software.source for setup in setups]),
        np.array([setup.software.family for setup in setups]),
        np.array([setup.cluster.chip.kind for setup in setups]),
        np.array([f"{setup.layout.precision} {setup.software.scaling}" for setup in setups]),
        np.array([_layout(setup) for setup in setups]),
        np.array([_shape(setup) for setup in setups]),
        np.array([_switches(setup) for setup in setups]),
    )


def _layout(setup: Setup) -> list[float]:
    layout = setup.layout
    sizes = {
        "tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "cp": layout.cp, "dp": layout.dp,
        "micro_batch": layout.micro_batch, "micro_batches": max(1, layout.micro_batches),
        "seq_len": layout.seq_len, "chips": layout.chips,
    }  # fmt: skip
    bubble = min(2.0, (layout.pp - 1) / (layout.vp * max(1, layout.micro_batches)))
    scaled = [float(np.log2(size)) / LAYOUT_SCALES[name] for name, size in sizes.items()]
    return [*scaled, bubble / LAYOUT_SCALES["bubble"]]


def _shape(setup: Setup) -> list[float]:
    shape, experts = setup.shape, setup.shape.experts
    width = experts.width if experts else shape.dense.width if shape.dense else 1
    sizes = {
        "hidden": shape.hidden, "layers": shape.layers, "experts": experts.count if experts else 1,
        "top_k": experts.top_k if experts else 1, "width": width, "vocab": shape.vocab,
    }  # fmt: skip
    return [float(np.log2(size)) / SHAPE_SCALES[name] for name, size in sizes.items()]


def _switches(setup: Setup) -> list[float]:
    software, layout = setup.software, setup.layout
    switches = (
        software.expert_overlap, software.dispatcher == "deduplicated", software.graphs, software.async_tp,
        software.compiled, software.folded, software.adapters, software.packed, layout.recompute == "full",
        layout.shard == "full", *(part in software.recomputed for part in ("mlp", "norm", "act")),
    )  # fmt: skip
    return [float(switch) for switch in switches]
