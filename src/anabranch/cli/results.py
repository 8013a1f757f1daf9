"""What a measuring command leaves: a JSON file of {machine, rows, ...}, a table, and where it was measured."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anabranch.errors import ConfigError
from anabranch.training.folder import require_folder


def require_json_file(json_file: Path | None, setting: str = "json") -> None:
    """Raise ConfigError where a file of results cannot be written: minutes of figures are not lost for want of a
    folder. setting: the option that names it."""
    if json_file is not None:
        require_folder(setting, json_file.absolute().parent)
        if json_file.is_dir():
            raise ConfigError(f"{json_file} is a folder; name a file", setting=setting)


def write_results(
    json_file: Path | None, rows: list[dict[str, Any]], about: dict[str, Any] | None = None, **more: Any
) -> None:
    """Write {machine, rows, ...}; nothing without a file. about: what else to say of where it was measured.

    Raises ConfigError where the file cannot be written after all.
    """
    if json_file is None:
        return
    content = json.dumps({"machine": {**machine(), **(about or {})}, "rows": rows, **more}, indent=1)
    try:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: an interrupted run goes on from what is there.
        beside = json_file.with_name(f".{json_file.name}.new")
        beside.write_text(content)
        beside.replace(json_file)
    except OSError as error:
        raise ConfigError(f"{json_file} cannot be written ({error.strerror})", setting="json") from error


def show_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """These columns as a table on stdout."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("workload", "policy", "planner") else "right")
    for row in rows:
        table.add_row(
            *(f"{v:.3g}" if isinstance(v := row[c], float) and abs(v) < 100 else str(v) for c in columns)
        )
    Console(width=None if os.isatty(1) else 160).print(table)


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    return {
        **processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def processor() -> dict[str, Any]:
    """What times of two runs must have in common to be compared."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return {"cpu": next(names, platform.processor()), "cores": os.cpu_count()}
