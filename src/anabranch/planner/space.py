"""All layouts of a model on a number of chips, as columns.

Bounds, beside what `Layout.check` demands: tp up to the scale-up domain and at most 64 chips; etp up to the domain and
8; pp up to the layers and 64; at most 8 virtual stages a rank, and where there are several, micro-batches that divide
by pp, as the interleaved schedule needs (Narayanan et al. 2021, arXiv:2104.04473, section 2.2); cp up to 32, for
sequences of at least 8192 tokens, each rank with at least 2048 of them; micro-batches of 1, 2, 4, 8 or 16 sequences;
the optimizer's state divided over dp ranks always. Published runs lie within these bounds but for micro-batches of 3,
6 and 12 and more virtual stages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.columns import LayoutColumns
from anabranch.errors import ConfigError
from anabranch.workload.layout import Layout, Precision
from anabranch.workload.shape import ModelShape

MOST_TP, MOST_ETP, MOST_PP, MOST_VP, MOST_CP = 64, 8, 64, 8, 32
LONG_TOKENS, LEAST_CP_TOKENS = 8192, 2048  # cp is for sequences of the first, and leaves a rank the second
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTED, SHARDED = ("none", "selective", "full"), ("optimizer", "full")

Rows = NDArray[np.int64]  # layouts by fields
TP, CP, PP, VP, EP, ETP, DP, MICRO, AGAIN, SHARD = range(10)


@dataclass(frozen=True)
class Space:
    """Layouts that differ in what the columns say. Without their search's reasons: all that can be."""

    columns: LayoutColumns
    precision: Precision

    def __len__(self) -> int:
        return len(self.columns.tp)

    def layout(self, row: int) -> Layout:
        """Raises IndexError where there is no such row."""
        at = {name: int(column[row]) for name, column in self.columns._asdict().items()}
        full, selective, _, fsdp = (at.pop(name) for name in ("full", "selective", "divided", "fsdp"))
        again = "full" if full else "selective" if selective else "none"
        return Layout(**at, recompute=again, precision=self.precision, shard="full" if fsdp else "optimizer")

    def parts(self, rows: int) -> Iterator["Space"]:
        """Pieces of at most so many rows, in order: what numpy works on then stays in the processor's cache."""
        for start in range(0, len(self), rows):
            yield self.at(slice(start, start + rows))

    def at(self, rows: NDArray[np.bool_] | NDArray[np.intp] | slice) -> "Space":
        return Space(LayoutColumns(*(column[rows] for column in self.columns)), self.precision)


def layouts(
    shape: ModelShape,
    chips: int,
    *,
    seq_len: int,
    global_batch: int,
    precision: Precision = "bf16",
    domain: int,
) -> Space:
    """Exactly those within the bounds for which `Layout.check(shape, chips)` passes; perhaps none.

    domain: chips of the scale-up domain.
    """
    found = _meshes(shape, chips, seq_len, global_batch, domain)
    found = _joined(found, _expert_meshes(shape, chips, domain))
    found = found[(chips // found[:, PP]) % (found[:, EP] * found[:, ETP]) == 0]
    dp = chips // (found[:, TP] * found[:, CP] * found[:, PP])
    found = _joined(np.column_stack([found, dp]), [(micro,) for micro in MICRO_BATCHES])
    found = found[global_batch % (found[:, DP] * found[:, MICRO]) == 0]
    micro_batches = global_batch // (found[:, DP] * found[:, MICRO])
    found = found[(found[:, VP] == 1) | (micro_batches % found[:, PP] == 0)]
    found = _joined(found, [(a, s) for a in range(len(RECOMPUTED)) for s in range(len(SHARDED))])
    return Space(_columns(found, seq_len, global_batch), precision)


def _meshes(shape: ModelShape, chips: int, seq_len: int, global_batch: int, domain: int) -> Rows:
    """(tp, cp, pp, vp) whose product leaves a whole dp that divides the batch."""
    sizes = divisors(chips)
    most_cp = min(MOST_CP, seq_len // LEAST_CP_TOKENS) if seq_len >= LONG_TOKENS else 1
    tps = [(n,) for n in sizes if n <= min(MOST_TP, domain) and _fits(shape, seq_len, tp=n)]
    cps = [(n,) for n in sizes if n <= most_cp]
    stages = [
        (pp, vp)
        for pp in sizes
        for vp in range(1, (MOST_VP if pp > 1 else 1) + 1)
        if pp <= MOST_PP and pp * vp <= shape.layers + shape.mtp and _fits(shape, seq_len, pp=pp, vp=vp)
    ]
    found = _joined(_joined(np.array(tps).reshape(-1, 1), cps), stages)
    ranks = found[:, TP] * found[:, CP] * found[:, PP]
    found = found[(chips % ranks == 0) & (seq_len % (found[:, TP] * found[:, CP]) == 0)]
    return found[global_batch % (chips // (found[:, TP] * found[:, CP] * found[:, PP])) == 0]


def _expert_meshes(shape: ModelShape, chips: int, domain: int) -> list[tuple[int, int]]:
    """(ep, etp) that the model's experts divide into."""
    sizes = divisors(chips) if shape.experts else [1]
    return [
        (ep, etp)
        for ep in sizes
        for etp in sizes
        if etp <= min(MOST_ETP, domain) and _fits(shape, 1, ep=ep, etp=etp, dp=ep * etp)
    ]


def _fits(shape: ModelShape, seq_len: int, **fields: int) -> bool:
    """Whether a layout of these degrees alone passes."""
    try:
        Layout(seq_len, fields.get("dp", 1) * fields.get("pp", 1), **cast("dict[str, Any]", fields)).check(
            shape
        )
    except ConfigError:
        return False
    return True


def _joined(found: Rows, more: list[tuple[int, ...]]) -> Rows:
    """Every row with every one of `more` behind it."""
    right = np.array(more, dtype=np.int64).reshape(len(more), -1)
    return np.hstack([np.repeat(found, len(right), axis=0), np.tile(right, (len(found), 1))])


def _columns(found: Rows, seq_len: int, global_batch: int) -> LayoutColumns:
    def column(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.ascontiguousarray(values, dtype=np.float64)

    def alike(value: int) -> NDArray[np.float64]:
        return np.full(len(found), float(value))

    tp, cp, pp, vp, ep, etp, dp, micro, again, shard = (column(values) for values in found.T)
    return LayoutColumns(
        tp=tp, pp=pp, vp=vp, ep=ep, etp=etp, cp=cp, dp=dp, micro_batch=micro,
        global_batch=alike(global_batch), seq_len=alike(seq_len),
        full=column(again == RECOMPUTED.index("full")), selective=column(again == RECOMPUTED.index("selective")),
        divided=alike(1), fsdp=column(shard == SHARDED.index("full")),
    )  # fmt: skip


def divisors(number: int) -> list[int]:
    """All, rising."""
    return [n for n in range(1, number + 1) if number % n == 0]
