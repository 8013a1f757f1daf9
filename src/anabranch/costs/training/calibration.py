"""Formula, residual and intervals together: fitted on measured runs, kept in a file, asked for predictions.

Intervals are split-conformal (Vovk et al. 2005; Papadopoulos et al. 2002 for normalised scores): |log error| over the
predicted deviation is scored on runs that the model had not seen, in folds that never cut a leak group, and a new
prediction's interval is its deviation times the scores' quantile. They hold for runs like the measured ones.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.columns import Column, columns_of
from anabranch.costs.training.efficiency import Efficiency, Families, fit_efficiency
from anabranch.costs.training.memory_error import memory_ratios
from anabranch.costs.training.published import TABLE, Published, read_published
from anabranch.costs.training.residual import Residual, Spread, fit_residual, residual_of
from anabranch.costs.training.setup import Setup
from anabranch.costs.training.traits import traits_of
from anabranch.errors import DataError

SHIPPED = Path(__file__).parent / "calibration.json"
_SHIPPED_TABLE = "published"  # stands for `TABLE` in a file, wherever the package lies
FOLDS = 10
MIN_GROUPS = 20  # fewer configurations than these give no quantile worth its name

Rows = NDArray[np.intp]


class Interval(NamedTuple):
    """Seconds of a step."""

    low: float
    high: float


class Prediction(NamedTuple):
    """Seconds of a step, and intervals that hold 80 and 90 of 100 runs."""

    step_s: float
    within80: Interval
    within90: Interval


@dataclass(frozen=True)
class Calibration:
    """scores: |log error| over deviation of runs that were predicted unseen, rising. chip_scores: of runs that were
    predicted without any run of their chip, for chips that have none. memory_ratios: measured over predicted peaks of
    memory, perhaps none."""

    efficiency: Efficiency
    residual: Residual
    scores: Column
    chip_scores: Column
    memory_ratios: Column

    def has_run(self, chip: str) -> bool:
        """Whether a run on this kind of chip was among the measured ones."""
        return bool((self.residual.traits.chip == chip).any())

    def predict(self, setups: Sequence[Setup]) -> list[Prediction]:
        """One prediction a setup."""
        if not setups:
            return []
        spread = Model(self.efficiency, self.residual).spread(setups)
        known = np.array([self.has_run(setup.cluster.chip.kind) for setup in setups])
        return predictions(*spread, self.scores, self.chip_scores, known)

    def save(self, file: Path, tables: Sequence[Path] = (TABLE,)) -> None:
        """All but the measured runs: `load_calibration` reads those again from `tables`, which must stay."""
        kept = {
            "tables": [_SHIPPED_TABLE if table == TABLE else str(table.absolute()) for table in tables],
            "efficiency": self.efficiency._asdict(),
            "amplitudes": self.residual.amplitudes.tolist(),
            "group": self.residual.group,
            "noise": self.residual.noise,
            "scores": self.scores.tolist(),
            "chip_scores": self.chip_scores.tolist(),
        }
        file.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def predictions(
    log_s: Column, deviation: Column, scores: Column, chip_scores: Column, known: NDArray[np.bool_]
) -> list[Prediction]:
    """With the quantiles of `scores`, and of `chip_scores` where not `known`; N each."""
    wide80, wide90 = (
        np.where(known, quantile(scores, share), quantile(chip_scores, share)) * deviation
        for share in (0.8, 0.9)
    )
    return [
        Prediction(
            float(np.exp(mid)),
            Interval(float(np.exp(mid - w80)), float(np.exp(mid + w80))),
            Interval(float(np.exp(mid - w90)), float(np.exp(mid + w90))),
        )
        for mid, w80, w90 in zip(log_s, wide80, wide90, strict=True)
    ]


def quantile(scores: Column, share: float) -> float:
    """The score that `share` of new ones stay below: the ceil((n + 1) share)-th smallest."""
    rank = int(np.ceil((len(scores) + 1) * share))
    return float(np.sort(scores)[min(rank, len(scores)) - 1])


def families_of(setups: Sequence[Setup]) -> Families:
    return Families(
        [setup.cluster.chip.family for setup in setups], [setup.software.family for setup in setups]
    )


class Model(NamedTuple):
    """Formula and residual, fitted on some runs."""

    efficiency: Efficiency
    residual: Residual

    def spread(self, setups: Sequence[Setup]) -> Spread:
        """Logarithm of the seconds of a step."""
        base = np.log(self.efficiency.step_s(columns_of(setups), families_of(setups)))
        rest = self.residual.at(traits_of(setups))
        return Spread(base + rest.mean, rest.deviation)


def fit(rows: Sequence[Published]) -> Model:
    """Formula first, then what it leaves over. A configuration weighs as one, however often it was measured."""
    setups, groups = [row.setup for row in rows], np.array([row.leak_group for row in rows])
    measured_s = np.array([row.step_s for row in rows])
    weights = np.array([1.0 / (groups == group).sum() for group in groups])
    columns, families = columns_of(setups), families_of(setups)
    efficiency = fit_efficiency(columns, families, measured_s, weights)
    left = np.log(measured_s / efficiency.step_s(columns, families))
    return Model(efficiency, fit_residual(traits_of(setups), left, groups))


class Fold(NamedTuple):
    """Rows of a table: those learned from, and those predicted."""

    seen: Rows
    unseen: Rows


def folds(groups: NDArray[np.str_], count: int = FOLDS, seed: int = 0) -> Iterator[Fold]:
    """Every row is unseen once; rows of one group always together."""
    names = np.unique(groups)
    np.random.default_rng(seed).shuffle(names)
    for part in np.array_split(names, min(count, len(names))):
        unseen = np.isin(groups, part)
        yield Fold(np.flatnonzero(~unseen), np.flatnonzero(unseen))


def without_each(rows: Sequence[Published], key: Callable[[Published], str]) -> list[Fold]:
    """A fold for each `key` (a model, a chip): its rows unseen, and nothing of their leak groups seen."""
    keys, groups = np.array([key(row) for row in rows]), np.array([row.leak_group for row in rows])
    parts = list[Fold]()
    for name in np.unique(keys):
        unseen = keys == name
        seen = ~unseen & ~np.isin(groups, groups[unseen])
        parts.append(Fold(np.flatnonzero(seen), np.flatnonzero(unseen)))
    return parts


class Unseen(NamedTuple):
    """Of N runs, each predicted by a model that had not seen its group: log seconds, deviation, score, fold."""

    log_s: Column
    deviation: Column
    score: Column
    fold: Rows


def predict_unseen(rows: Sequence[Published], parts: Sequence[Fold]) -> Unseen:
    """Fits one model a fold."""
    size = len(rows)
    log_s, deviation, fold = np.zeros(size), np.ones(size), np.zeros(size, dtype=np.intp)
    for number, part in enumerate(parts):
        model = fit([rows[int(i)] for i in part.seen])
        spread = model.spread([rows[int(i)].setup for i in part.unseen])
        log_s[part.unseen], deviation[part.unseen] = spread
        fold[part.unseen] = number
    error = np.abs(np.log([row.step_s for row in rows]) - log_s)
    return Unseen(log_s, deviation, error / deviation, fold)


def calibrate(rows: Sequence[Published]) -> Calibration:
    """Raises DataError where there are too few configurations to learn from."""
    groups = np.array([row.leak_group for row in rows])
    if len(np.unique(groups)) < MIN_GROUPS:
        raise DataError(
            f"{len(np.unique(groups))} configurations, at least {MIN_GROUPS} are needed", setting="table"
        )
    unseen = predict_unseen(rows, list(folds(groups)))
    without = predict_unseen(rows, without_each(rows, lambda row: row.setup.cluster.chip.kind))
    return Calibration(*fit(rows), np.sort(unseen.score), np.sort(without.score), memory_ratios(rows))


def load_calibration(file: Path = SHIPPED) -> Calibration:
    """What `Calibration.save` wrote. Raises DataError where the file is none of ours or a table of its runs is gone."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        tables = [TABLE if name == _SHIPPED_TABLE else Path(name) for name in kept["tables"]]
        rows = [row for table in tables for row in read_published(table)[0]]
        efficiency, setups = Efficiency(**kept["efficiency"]), [row.setup for row in rows]
        formula_s = efficiency.step_s(columns_of(setups), families_of(setups))
        residual = residual_of(
            traits_of(setups),
            np.log(np.array([row.step_s for row in rows]) / formula_s),
            np.array([row.leak_group for row in rows]),
            np.array(kept["amplitudes"]),
            kept["group"],
            kept["noise"],
        )
        scores = np.array(kept["scores"]), np.array(kept["chip_scores"])
        return Calibration(efficiency, residual, *scores, memory_ratios(rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: {error}; make it with `anabranch calibrate`", setting="calibration"
        ) from error
