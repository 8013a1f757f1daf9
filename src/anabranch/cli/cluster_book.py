"""Cells of the cluster benchmark on disk: written one by one, so that an interrupted grid goes on where it was."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anabranch.cli.cluster_verdict import Row, verdict
from anabranch.cli.results import processor, write_results
from anabranch.errors import ConfigError

# Where the code of a cell's measurement starts: one rank's job, the lab it runs in, and what that lab is.
ENTRIES = ("anabranch.cli.bench_cluster", "anabranch.lab.cluster", "anabranch.cli.cluster_grid")


def code_version(entries: Sequence[str] = ENTRIES) -> str:
    """A digest of everything that `entries` import of this package, C++ beside it included, and of the versions of what
    they call."""
    digest, modules = hashlib.sha256(), sorted(_closure(entries))
    for name in modules:
        digest.update(name.encode() + _source(name).encode())
    for folder in sorted({_file(name).parent for name in modules}):
        for file in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
            digest.update(file.read_bytes())
    for package in ("torch", "transformers", "numpy"):
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()[:12]


def comparable(settings: dict[str, Any], entries: Sequence[str] = ENTRIES) -> dict[str, Any]:
    """What figures of one file have in common: these settings, the processor, and the code of `entries`."""
    return {**settings, **processor(), "code": code_version(entries)}


def rows_of(
    json_file: Path | None, settings: dict[str, Any], judge: Callable[[list[Row]], object]
) -> list[Row]:
    """What an earlier run left in the file; nothing where there is none.

    Raises ConfigError where it was measured with other settings, and where `judge`, which makes of rows what the file
    is for, cannot do so with those that are there.
    """
    if json_file is None or not json_file.exists():
        return []
    try:
        held: Any = json.loads(json_file.read_text(encoding="utf-8"))
        found, rows = {key: held["machine"].get(key) for key in settings}, list(held["rows"])
        other = [f"{key} {found[key]}" for key, value in settings.items() if found[key] != value]
        if rows and not other:
            judge(rows)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{json_file} holds no rows of this benchmark ({type(error).__name__}: {error}); name another file",
            setting="json",
        ) from error
    if rows and other:
        raise ConfigError(
            f"{json_file} holds cells measured with {', '.join(other)}; to keep them name another file, or "
            "remove it",
            setting="json",
        )
    return rows


class Book:
    """The rows of one file, which only ever holds cells of one processor, code version and set of settings.

    `rows` are those found there and those added. Raises ConfigError where the file holds other cells: figures
    that may not be compared are never mixed, nor thrown away.
    """

    def __init__(self, json_file: Path | None, settings: dict[str, Any]) -> None:
        self._file, self._settings = json_file, comparable(settings)
        self.rows = rows_of(json_file, self._settings, verdict)

    def holds(self, topology: str, inter_mbit: float | None, workload: str) -> bool:
        """Whether this cell was measured already."""
        return (topology, inter_mbit, workload) in self.cells()

    def cells(self) -> set[tuple[str, float | None, str]]:
        return {(row["topology"], row["inter_mbit"], row["workload"]) for row in self.rows}

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the rows of one cell, and write them down."""
        self.rows += rows
        if self._file is not None:
            # Whole or not at all: an interruption must not cost the cells before it.
            beside = self._file.with_name(f".{self._file.name}.tmp")
            write_results(beside, self.rows, self._settings, verdict=verdict(self.rows)._asdict())
            beside.replace(self._file)


def _closure(entries: Sequence[str]) -> set[str]:
    found: set[str] = set()
    todo: list[str] = [*entries]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += _imports(name)
    return found


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_source(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "anabranch")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "anabranch":
            yield node.module
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (module for module in inner if _is_module(module))


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _source(name: str) -> str:
    return _file(name).read_text(encoding="utf-8")


def _file(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)
