"""Fields of a model's config, read with the demand that each one must meet."""

from collections.abc import Mapping
from typing import NoReturn, cast

from anabranch.errors import ConfigError

KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class Fields:
    """A config (or a part of one, under `prefix`). Every failure is a ConfigError naming the field's path and `source`.

    A field that is null counts as absent, as transformers has it.
    """

    def __init__(self, config: Mapping[str, object], source: str, prefix: str = "") -> None:
        self.config, self.source, self.prefix = config, source, prefix

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ConfigError(f"{problem} (in {self.source})", setting=self.prefix + name)

    def part(self, name: str) -> "Fields":
        """The fields of a nested object."""
        value = self.config.get(name)
        if not isinstance(value, Mapping):
            self.fail(name, "must be an object with the fields of the language model")
        return Fields(cast("Mapping[str, object]", value), self.source, f"{self.prefix}{name}.")

    def text(self, name: str) -> str:
        value = self.config.get(name)
        if not isinstance(value, str):
            self.fail(name, "missing, or not a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, f"{value!r} must be true or false")
        return value

    def given(self, name: str, least: int = 1) -> int | None:
        """A whole number of at least `least`, or None where it is absent."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.fail(name, f"{value!r} must be a whole number of at least {least}")
        return value

    def count(self, name: str, least: int = 1, default: int | None = None) -> int:
        """As `given`; absent, it is `default`, and without one an error."""
        value = self.given(name, least)
        if value is None and default is None:
            self.fail(name, "missing")
        return cast("int", default if value is None else value)

    def positive(self, name: str, default: float) -> bool:
        """Whether a number (a rate of dropout) is above zero."""
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or value < 0:
            self.fail(name, f"{value!r} must be a number of at least 0")
        return value > 0

    def indices(self, name: str, layers: int) -> tuple[int, ...] | None:
        """Distinct indices of layers, ascending, or None where the field is absent."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fail(name, "must be a list of indices of layers")
        items = cast("list[object]", value)
        found = sorted({item for item in items if isinstance(item, int) and 0 <= item < layers})
        if len(found) != len(items):
            self.fail(name, f"must hold distinct indices from 0 to {layers - 1}")
        return tuple(found)

    def windowed(self, layers: int) -> tuple[int, ...] | None:
        """Layers that `layer_types` gives a window, or None where the field is absent."""
        value = self.config.get("layer_types")
        if value is None:
            return None
        kinds = cast("list[object]", value) if isinstance(value, list) else []
        if len(kinds) != layers or not all(kind in KINDS for kind in kinds):
            self.fail("layer_types", f"must name one of {', '.join(KINDS)} for each of {layers} layers")
        return tuple(i for i, kind in enumerate(kinds) if kind != KINDS[0])
