"""How well the calibrated model predicts runs it has not seen, beside two simpler models.

On the shipped table: cross-validation over leak groups. On another table: fitted on the shipped rows that share no
leak group with it. Intervals of a row come from scores of other folds only.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from anabranch.costs.training.calibration import (
    Fold,
    Prediction,
    calibrate,
    folds,
    predict_unseen,
    predictions,
    without_each,
)
from anabranch.costs.training.columns import Column
from anabranch.costs.training.published import Published


class Scored(NamedTuple):
    """A row with its prediction in the row's own quantity. For rates, low and high change places."""

    row: Published
    predicted: float
    low90: float
    high90: float

    @property
    def error_pct(self) -> float:
        return abs(self.predicted / self.row.measured - 1.0) * 100.0

    @property
    def covered(self) -> bool:
        return self.low90 <= self.row.measured <= self.high90


def score(row: Published, prediction: Prediction) -> Scored:
    bounds = sorted(row.in_quantity(step_s) for step_s in prediction.within90)
    return Scored(row, row.in_quantity(prediction.step_s), bounds[0], bounds[1])


def cross_validate(rows: Sequence[Published], parts: Sequence[Fold] | None = None) -> list[Scored]:
    """Every row by a model that has not seen its fold; leak groups are never cut."""
    parts = parts or list(folds(np.array([row.leak_group for row in rows])))
    unseen = predict_unseen(rows, parts)
    scored: dict[int, Scored] = {}
    for number, part in enumerate(parts):
        others = unseen.score[unseen.fold != number]
        known = np.ones(len(part.unseen), dtype=np.bool_)
        made = predictions(unseen.log_s[part.unseen], unseen.deviation[part.unseen], others, others, known)
        scored.update({int(i): score(rows[int(i)], p) for i, p in zip(part.unseen, made, strict=True)})
    return [scored[i] for i in range(len(rows))]


def score_table(rows: Sequence[Published], shipped: Sequence[Published]) -> list[Scored]:
    """Rows of another table, by a model of the shipped rows without their leak groups."""
    theirs = {row.leak_group for row in rows} | {row.id for row in rows}
    known = [row for row in shipped if row.leak_group not in theirs and row.id not in theirs]
    made = calibrate(known).predict([row.setup for row in rows])
    return [score(row, prediction) for row, prediction in zip(rows, made, strict=True)]


def leave_out(rows: Sequence[Published], key: Callable[[Published], str]) -> list[Scored]:
    """Every row by a model that has seen none with the same `key` (a model, a chip) and none of its leak group."""
    return cross_validate(rows, without_each(rows, key))


def constant_mfu(rows: Sequence[Published], known: Sequence[Published]) -> list[float]:
    """Errors in percent of the usual estimate: model FLOPs over peak at one utilisation, the median of the `known`
    rows of other leak groups."""
    groups, slowdowns = (
        np.array([row.leak_group for row in known]),
        np.array([row.step_s / ideal_s(row) for row in known]),
    )
    errors = list[float]()
    for row in rows:
        step_s = ideal_s(row) * float(np.median(slowdowns[groups != row.leak_group]))
        errors.append(abs(row.in_quantity(step_s) / row.measured - 1.0) * 100.0)
    return errors


def ideal_s(row: Published) -> float:
    """Forward and backward FLOPs of a step at the peak of the stated precision."""
    layout, chip = row.setup.layout, row.setup.cluster.chip
    flops = 3.0 * row.setup.shape.forward_flops(layout.seq_len).total * layout.tokens
    return flops / (layout.chips * chip.peak_tflops(layout.precision).mid * 1e12)


def without_skew(rows: Sequence[Published]) -> list[Published]:
    """The same rows, as if all experts were equally popular."""
    return [replace(row, setup=replace(row.setup, skew=1.0)) for row in rows]


def layout_regrets(scored: Sequence[Scored]) -> list[float]:
    """Percent lost by taking the layout that is predicted fastest where several were measured, one figure a choice.

    A choice: the same source, model, hardware, precision, batch and length in at least two layouts.
    """
    choices: dict[tuple[Any, ...], dict[Any, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        setup, layout = one.row.setup, one.row.setup.layout
        same = (setup.software.source, setup.software.scaling, setup.software.adapters, setup.shape,
                str(setup.cluster), layout.precision, layout.global_batch, layout.seq_len)  # fmt: skip
        choices[same][layout].append(one)
    return [_regret(layouts) for layouts in choices.values() if len(layouts) > 1]


def _regret(layouts: dict[Any, list[Scored]]) -> float:
    measured = {name: float(np.median([one.row.step_s for one in ones])) for name, ones in layouts.items()}
    predicted = {name: float(np.median([_step_s(one) for one in ones])) for name, ones in layouts.items()}
    chosen = min(predicted, key=lambda name: predicted[name])
    return (measured[chosen] / min(measured.values()) - 1.0) * 100.0


def _step_s(one: Scored) -> float:
    """The predicted step; `in_quantity` is its own inverse for rates and the identity for times."""
    return one.row.in_quantity(one.predicted)


class Summary(NamedTuple):
    """Of errors in percent."""

    mape_pct: float
    median_pct: float
    p90_pct: float

    @staticmethod
    def of(errors_pct: Sequence[float] | Column) -> "Summary":
        return Summary(
            float(np.mean(errors_pct)), float(np.median(errors_pct)), float(np.percentile(errors_pct, 90))
        )
