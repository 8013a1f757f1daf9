"""ModelShape from a Hugging Face config: a dict, a file, a model's folder, or the name of a shape shipped with us."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

from anabranch.errors import ConfigError
from anabranch.workload.families import FAMILIES, WITH_TEXT_PART
from anabranch.workload.fields import Fields
from anabranch.workload.shape import ModelShape

SHIPPED = Path(__file__).parent / "shapes"


def shape_from_config(config: Mapping[str, object], source: str = "the config") -> ModelShape:
    """config: as in a model's config.json. source: where it is from, for messages.

    Raises ConfigError with the field's path: it is missing or nonsensical, or `model_type` is of no known family.
    """
    fields = Fields(config, source)
    kind = fields.text("model_type")
    if kind in WITH_TEXT_PART:
        fields = fields.part("text_config")
        kind = WITH_TEXT_PART[kind]
    if kind not in FAMILIES:
        known = ", ".join(sorted([*FAMILIES, *WITH_TEXT_PART]))
        fields.fail("model_type", f"{kind!r} is of no known family; known are {known}")
    return FAMILIES[kind](fields)


def read_config(path_or_name: str | Path) -> dict[str, object]:
    """The config itself: of a file, of a folder with a config.json, or of a shipped shape by its name.

    Names are those of the hub, with or without owner, "-config" and ".json", in any case.
    Raises ConfigError naming `model` where nothing is found, or no JSON object.
    """
    path = _file(path_or_name)
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}", setting="model") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object", setting="model")
    return cast("dict[str, object]", content)


def read_shape(path_or_name: str | Path) -> ModelShape:
    """The shape of what `read_config` finds. Raises ConfigError as both of its parts do."""
    return shape_from_config(read_config(path_or_name), str(_file(path_or_name)))


@cache
def shipped_shapes() -> dict[str, Path]:
    """Files of the shapes that come with the package, by their names on the hub."""
    paths = sorted(SHIPPED.glob("*.json"))
    return {json.loads(path.read_text(encoding="utf-8"))["name"]: path for path in paths}


def _file(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    wanted = _plain(str(path_or_name))
    for name, shipped in shipped_shapes().items():
        if wanted in (_plain(name), shipped.stem.lower()):
            return shipped
    raise ConfigError(
        f"{path_or_name} is no config file, no folder with a config.json and no shipped shape; "
        f"shipped are {', '.join(shipped_shapes())}",
        setting="model",
    )


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower().removesuffix(".json").removesuffix("-config")
