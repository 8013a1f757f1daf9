"""A plan as a file that `anabranch train --plan` takes: the settings that its layout comes to.

`train` shards parameters over all ranks (FSDP), experts over `ep_size` of them, and takes a step with every
micro-batch. It has no tensor, pipeline or context parallelism, no recomputation, and no fp8.
"""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from anabranch.costs.training.columns import LayoutColumns
from anabranch.errors import ConfigError
from anabranch.workload.layout import Layout

VERSION = 1
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Settings of `train` that a plan holds, by the type of each.
SETTINGS: dict[str, type] = {
    "model": str, "ranks": int, "ep_size": int, "batch_size": int, "sequence_length": int, "dtype": str, "steps": int,
    "planner": str, "transport": str,
}  # fmt: skip
ABSENT = {
    "tp": "tensor parallelism", "pp": "pipeline parallelism", "cp": "context parallelism",
    "etp": "tensor parallelism inside experts",
}  # fmt: skip


def trainable(layouts: LayoutColumns) -> NDArray[np.bool_]:
    """Which layouts `train` can run, N."""
    alone = (layouts.tp == 1) & (layouts.pp == 1) & (layouts.cp == 1) & (layouts.etp == 1)
    whole = (layouts.full == 0) & (layouts.selective == 0) & (layouts.fsdp == 1)
    return alone & whole & (layouts.micro_batches == 1)


def train_settings(layout: Layout, model: str, steps: int, planner: str) -> dict[str, Any]:
    """Raises ConfigError naming the first thing that `train` cannot do."""
    for field, name in ABSENT.items():
        if getattr(layout, field) > 1:
            raise ConfigError(f"`anabranch train` has no {name}: {field} must be 1", setting=field)
    if layout.recompute != "none":
        raise ConfigError("`anabranch train` recomputes nothing: it must be none", setting="recompute")
    if layout.shard != "full":
        raise ConfigError(
            "`anabranch train` shards parameters over all ranks: it must be full", setting="shard"
        )
    if layout.micro_batches != 1:
        raise ConfigError(
            f"`anabranch train` takes a step with every micro-batch: use {layout.dp * layout.micro_batch}, "
            f"dp x micro_batch, not {layout.global_batch}",
            setting="global_batch",
        )
    if layout.precision not in DTYPES:
        raise ConfigError(f"`anabranch train` computes in {' or '.join(DTYPES)}", setting="precision")
    return {
        "model": model, "ranks": layout.dp, "ep_size": layout.ep, "batch_size": layout.micro_batch,
        "sequence_length": layout.seq_len, "dtype": DTYPES[layout.precision], "steps": steps, "planner": planner,
        "transport": "auto",
    }  # fmt: skip


def write_launch(file: Path, settings: dict[str, Any], predicted: dict[str, Any]) -> None:
    """predicted: what the plan says of the run, for whoever reads the file. Raises ConfigError where it cannot be."""
    content = {"anabranch_plan": VERSION, "train": settings, "predicted": predicted}
    try:
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}", setting="emit") from error


def read_launch(file: Path) -> dict[str, Any]:
    """The settings of `train`. Raises ConfigError naming the field that is wrong."""
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}", setting="plan") from error
    plan = cast("dict[str, Any]", content if isinstance(content, dict) else {})
    if plan.get("anabranch_plan") != VERSION:
        raise ConfigError(
            f"{file} is no plan of this version: `anabranch plan --emit` writes one", setting="plan"
        )
    settings: dict[str, Any] = plan["train"] if isinstance(plan.get("train"), dict) else {}
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ConfigError(f"no setting that a plan holds (in {file})", setting=f"train.{name}")
        if not isinstance(value, SETTINGS[name]) or isinstance(value, bool):
            raise ConfigError(f"{value!r} is of another type (in {file})", setting=f"train.{name}")
    return settings
