"""Tables of TOML files that know where they stand: every complaint names the file and the field's path."""

import datetime
import difflib
import re
import tomllib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from anabranch.errors import CatalogError, ConfigError
from anabranch.hardware.figure import UNITS, Figure

Place = tuple[str, ...]
SHIPPED = Path(__file__).parent / "catalog"
DATE = re.compile(r"\d{4}(-\d\d){0,2}")
BARE_KEY = re.compile(r"[\w-]+(\[\d+\])?")
AMOUNT = ("value", "low", "high", "unit")
FIGURE = (*AMOUNT, "source", "date", "confidence")
MOST = 1_000_000  # of anything that is counted


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean p5.48xlarge?", or nothing where no known name is close."""
    by_lower = {other.lower(): other for other in known}
    starts = [lower for lower in by_lower if lower.startswith(name.lower()) or name.lower().startswith(lower)]
    close = starts or difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""


def read_toml(path: Path) -> dict[str, Any]:
    """The whole file. Raises CatalogError where it cannot be read or is no TOML; it then says the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path} is no readable TOML file: {error}") from error


@dataclass(frozen=True)
class Table:
    """One table. place: its path from the root. files: who last wrote what lies at a place."""

    values: dict[str, Any]
    place: Place
    files: dict[Place, Path]

    def add(self, other: dict[str, Any], file: Path) -> None:
        """Lays `other` over this table: fields of both come from `other`, figures as a whole."""
        for key, value in other.items():
            place, mine, theirs = (*self.place, key), _mapping(self.values.get(key)), _mapping(value)
            if mine is None or theirs is None or theirs.keys() & AMOUNT:
                self.values[key] = value
                self.files.pop(place, None)  # so that it comes last
                self.files[place] = file
            else:
                Table(mine, place, self.files).add(theirs, file)

    def file(self, place: Place | None = None) -> Path:
        """Who last wrote at `place` or below it, else who wrote the table around it."""
        place = tuple(key.split("[")[0] for key in (self.place if place is None else place))
        below = [file for at, file in self.files.items() if at[: len(place)] == place]
        return below[-1] if below else self.file(place[:-1])

    def error(self, key: str, problem: str) -> CatalogError:
        place = (*self.place, *([key] if key else []))
        path = ".".join(part if BARE_KEY.fullmatch(part) else f'"{part}"' for part in place)
        return CatalogError(f"{problem} (in {self.file(place)})", setting=path)

    def only(self, *names: str) -> None:
        """Raises CatalogError for a field of another name."""
        for key in self.values:
            if key not in names:
                raise self.error(key, f"no such field.{nearest(key, names)} Fields: {', '.join(names)}")

    def get(self, key: str, kind: type, what: str) -> Any:
        """The field `key`. Raises CatalogError where it is missing or not a `kind`, called `what`."""
        if key not in self.values:
            raise self.error(key, f"missing; give {what}")
        value = self.values[key]
        # A whole number is a number; true, which Python counts as 1, is none.
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.error(key, f"{value!r} is not {what}")
        return value

    def table(self, key: str) -> "Table":
        return Table(self.get(key, dict, "a table"), (*self.place, key), self.files)

    def tables(self, key: str) -> dict[str, "Table"]:
        """The tables in the table `key`, by name; none where it is not there."""
        if key not in self.values:
            return {}
        group = self.table(key)
        return {name: group.table(name) for name in group.values}

    def rows(self, key: str) -> list["Table"]:
        """The tables in the array `key`; none where it is not there."""
        if key not in self.values:
            return []
        items = self._items(key)
        return [items.table(name) for name in items.values]

    def word(self, key: str) -> str:
        word: str = self.get(key, str, "a text in quotes")
        if not word.strip():
            raise self.error(key, "empty")
        return word

    def words(self, key: str) -> tuple[str, ...]:
        """The texts in the array `key`; none where it is not there."""
        return self._all(key, str, "a text in quotes") if key in self.values else ()

    def counts(self, key: str) -> tuple[int, ...]:
        """The whole numbers in the array `key`; none where it is not there."""
        return self._all(key, int, "a whole number") if key in self.values else ()

    def _all(self, key: str, kind: type, what: str) -> tuple[Any, ...]:
        items = self._items(key)
        return tuple(items.get(name, kind, what) for name in items.values)

    def _items(self, key: str) -> "Table":
        """The array `key` as a table with fields key[0], key[1], ..., so that complaints say which one."""
        items: list[Any] = self.get(key, list, "an array in brackets")
        return Table({f"{key}[{i}]": item for i, item in enumerate(items)}, self.place, self.files)

    def count(self, key: str) -> int:
        count: int = self.get(key, int, "a whole number")
        if not 1 <= count <= MOST:
            raise self.error(key, f"must be at least 1 and at most {MOST}")
        return count

    def number(self, key: str) -> float:
        try:
            return float(self.get(key, float, "a number"))
        except OverflowError as error:  # a whole number of any length is TOML
            raise self.error(key, "too large") from error

    def figure(self, key: str, unit: str, *, zero: bool = False) -> Figure:
        """The figure `key` in `unit`, whatever unit of its kind the file has; see `as_figure`."""
        table = self.table(key)
        table.only(*FIGURE)
        return table.as_figure(unit, zero=zero)

    def as_figure(self, kind: str | None, *, zero: bool = False) -> Figure:
        """This table as a figure in the unit `kind`; None: in the unit that stands for its own. zero: it may be 0.

        Raises CatalogError naming the field that is wrong. In a user's own file `source` may be left out, it is then
        the file, and `confidence`, which is then "user".
        """
        exact = "value" in self.values
        if exact and self.values.keys() & {"low", "high"}:
            raise self.error("value", "give value, or low and high, not both")
        names = ("value", "value") if exact else ("low", "high")
        low, high = (self.number(name) for name in names)
        unit, origin = self.unit(kind), self.origin()
        with self.owning({"low": "value", "high": "value"} if exact else {}):
            figure = Figure(low, high, unit, *origin).in_base()
        if not low and not zero:
            raise self.error(names[0], "must be above 0")
        return figure

    @contextmanager
    def owning(self, names: Mapping[str, str] | None = None) -> Generator[None]:
        """A ConfigError of what is made from this table becomes a CatalogError at its field.

        names: of fields here, by the settings that errors name, where they differ.
        """
        try:
            yield
        except ConfigError as error:
            setting = error.setting or ""
            problem = str(error).removeprefix(f"{setting}: ")
            raise self.error((names or {}).get(setting, setting), problem) from error

    def unit(self, kind: str | None) -> str:
        units = [name for name, (base, _) in UNITS.items() if kind in (base, None)]
        unit: str = self.get("unit", str, f"one of {', '.join(units)}")
        if unit not in units:
            raise self.error("unit", f"{unit!r} is none of {', '.join(units)}")
        return unit

    def origin(self) -> tuple[str, str, str]:
        """Source, confidence and date of a figure."""
        shipped = self.file().parent == SHIPPED
        source = self.word("source") if shipped or "source" in self.values else str(self.file())
        confidence = self.word("confidence") if shipped or "confidence" in self.values else "user"
        date = self.values.get("date", "")
        if isinstance(date, datetime.date):
            date = date.isoformat()
        if date != "" and not (isinstance(date, str) and DATE.fullmatch(date)):
            raise self.error("date", f'{date!r}; write "2026-10-07", "2026-10" or "2026"')
        return source, confidence, date


def _mapping(value: object) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
