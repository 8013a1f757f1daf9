"""Chips, instances and prices from the tables of a catalog."""

from collections.abc import Mapping

from anabranch.hardware.chip import PRECISIONS, Chip
from anabranch.hardware.figure import Figure
from anabranch.hardware.instance import Instance
from anabranch.hardware.link import Link
from anabranch.hardware.price import BASES, Price
from anabranch.hardware.table import FIGURE, Table, nearest


def chip_of(table: Table) -> Chip:
    """Raises CatalogError naming the field that is wrong."""
    table.only("family", "devices", "peak", "memory", "memory_bandwidth", "power", "idle_power")
    peak = table.table("peak")
    peak.only(*PRECISIONS)
    if not peak.values:
        raise peak.error("", f"give the dense peak of one of {', '.join(PRECISIONS)}")
    return Chip(
        kind=table.place[-1],
        family=table.word("family"),
        peaks={precision: peak.figure(precision, "TFLOP/s") for precision in peak.values},
        memory_gib=table.figure("memory", "GiB"),
        memory_gb_per_s=table.figure("memory_bandwidth", "GB/s"),
        power_w=table.figure("power", "W") if "power" in table.values else None,
        idle_w=table.figure("idle_power", "W", zero=True) if "idle_power" in table.values else None,
        devices=table.words("devices"),
    )


def instance_of(table: Table, chips: Mapping[str, Chip]) -> Instance:
    """chips: those that it may carry. Raises CatalogError naming the field that is wrong."""
    table.only("chip", "chips", "scale_up", "scale_out", "overhead_power", "prices")
    kind, count = table.word("chip"), table.count("chips")
    if kind not in chips:
        raise table.error("chip", f"no chip {kind!r}.{nearest(kind, chips)} Chips: {', '.join(chips)}")
    levels = tuple(_link_of(row) for row in table.rows("scale_up"))
    # The file tells the instance's whole bandwidth, as AWS does; a chip has its share of it.
    out = table.figure("scale_out", "GB/s").scaled(1 / count) if "scale_out" in table.values else None
    overhead = table.figure("overhead_power", "W", zero=True) if "overhead_power" in table.values else None
    prices = {basis: _price_of(row) for basis, row in table.tables("prices").items()}
    with table.owning():
        return Instance(table.place[-1], chips[kind], count, levels, out, overhead, prices)


def _link_of(table: Table) -> Link:
    table.only("topology", "chips", "shape", "bandwidth")
    topology, chips, rate = table.word("topology"), table.count("chips"), table.figure("bandwidth", "GB/s")
    with table.owning():
        return Link(topology, rate, chips, table.counts("shape"))


def _price_of(table: Table) -> Price:
    basis = table.place[-1]
    if basis not in BASES:
        raise table.error("", f"no such basis.{nearest(basis, BASES)} Bases: {', '.join(BASES)}")
    table.only(*FIGURE, "history")
    before = table.rows("history")
    for row in before:
        row.only(*FIGURE)
    history = tuple(row.as_figure("USD/h", zero=True) for row in before)
    return Price(basis, table.as_figure("USD/h", zero=True), history)


def figure_of(table: Table) -> Figure:
    """A figure that belongs to no chip or instance, in a unit of any kind."""
    table.only(*FIGURE)
    return table.as_figure(None, zero=True)
