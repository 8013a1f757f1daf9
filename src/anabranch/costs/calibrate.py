"""Measured samples on disk, so that a group of hosts is measured once for a layer's shape.

One small JSON file for each key, in one folder.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

from anabranch.costs.prices import CalibratedPrices
from anabranch.errors import ConfigError
from anabranch.telemetry.samples import Samples

# Part of the file's name: what another version measured is measured anew. To be raised with every change of what a
# sample means.
VERSION = 3


class Calibration:
    """Samples by key, in the files of one folder, which `store` makes; and the prices they amount to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of a key, there or not."""
        return self.folder / f"samples-{VERSION}-{key}.json"

    def load(self, key: str) -> Samples | None:
        """What was stored under `key`, or None where nothing usable was: then measure.

        A damaged or outdated file is ignored with a RuntimeWarning; the next `store` replaces it.
        """
        path = self.path(key)
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return _ignored(path, str(error))
        if not isinstance(content, dict):
            return _ignored(path, "not a JSON object")
        held = cast("dict[str, Any]", content)
        if (
            held.get("version") != VERSION
            or held.get("key") != key
            or not isinstance(held.get("samples"), dict)
        ):
            return _ignored(path, "of another version or another key")
        try:
            return Samples.from_json(held["samples"])
        except ConfigError as error:
            return _ignored(path, str(error))

    def store(self, key: str, samples: Samples) -> None:
        """Writes the file whole or not at all. Raises ConfigError naming `cache` where the folder cannot be written."""
        content = {"version": VERSION, "key": key, "samples": samples.to_json()}
        path = self.path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written ({error}); name another folder", setting="cache"
            ) from error

    def prices(self, samples: Samples) -> CalibratedPrices:
        """What calls cost on the machine that was measured."""
        return CalibratedPrices(samples)


def _ignored(path: Path, problem: str) -> None:
    warnings.warn(f"{path} is ignored and measured anew: {problem}", RuntimeWarning, stacklevel=3)
