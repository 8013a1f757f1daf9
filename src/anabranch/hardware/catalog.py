"""The catalog: chips, instances and single figures from the shipped TOML files and the user's own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from anabranch.errors import ConfigError
from anabranch.hardware.assembly import chip_of, figure_of, instance_of
from anabranch.hardware.chip import Chip
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Cluster, Instance
from anabranch.hardware.processor import CPU, measure_cpu
from anabranch.hardware.table import SHIPPED, Table, nearest, read_toml


@dataclass(frozen=True)
class Catalog:
    """What is known, by name. figures: what belongs to no chip or instance, such as electricity's price.

    The instance "cpu" is this machine: it is measured when it is first asked for, in under a second, unless a file
    has one of that name. Unknown names raise ConfigError with the nearest known one and all of them.
    """

    chips: Mapping[str, Chip]
    instances: Mapping[str, Instance]
    figures: Mapping[str, Figure]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all instances, "cpu" the last."""
        return (*self.instances, *([] if CPU in self.instances else [CPU]))

    def chip(self, kind: str) -> Chip:
        return self.chips[_known("chip", kind, self.chips)]

    def instance(self, name: str) -> Instance:
        if _known("instance", name, self.names) not in self.instances:
            return self._cpu
        return self.instances[name]

    def figure(self, name: str) -> Figure:
        return self.figures[_known("figure", name, self.figures)]

    def cluster(self, text: str) -> Cluster:
        """Of "trn2.48xlarge:4" four such instances; of "trn2.48xlarge" one."""
        name, colon, nodes = text.partition(":")
        if colon and not re.fullmatch("[0-9]{1,6}", nodes):
            raise ConfigError(
                f"{text!r}: write an instance and how many, up to 999999, trn2.48xlarge:4", setting="cluster"
            )
        return Cluster(self.instance(name), int(nodes) if colon else 1)

    @cached_property
    def _cpu(self) -> Instance:
        return measure_cpu()


def load_catalog(extra: Path | None = None) -> Catalog:
    """The shipped catalog, with the file `extra` over it.

    `extra` has the shipped files' form. It may hold a single field of a chip or instance, or new ones; a figure is
    replaced as a whole. Raises CatalogError naming the file and the field's path.
    """
    root = Table({}, (), {})
    for file in (*sorted(SHIPPED.glob("*.toml")), *([extra] if extra else [])):
        root.add(read_toml(file), file)
    root.only("chips", "instances", "figures")
    chips = {kind: chip_of(table) for kind, table in root.tables("chips").items()}
    instances = {name: instance_of(table, chips) for name, table in root.tables("instances").items()}
    figures = {name: figure_of(table) for name, table in root.tables("figures").items()}
    return Catalog(chips, instances, figures)


def _known(setting: str, name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    if name not in known:
        raise ConfigError(
            f"the catalog has no {name!r}.{nearest(name, known)} It has {', '.join(known)}", setting=setting
        )
    return name
