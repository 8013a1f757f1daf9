"""The shipped catalog is whole and sourced; a user's file lies over it; what is wrong is told with file and path."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import CatalogError, ConfigError
from anabranch.hardware.assembly import figure_of
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.chip import PRECISIONS
from anabranch.hardware.figure import CONFIDENCES, UNITS, Figure
from anabranch.hardware.table import SHIPPED, Table, read_toml

CATALOG = load_catalog()
SHIPPED_FILES = sorted(SHIPPED.glob("*.toml"))

MINE = """
[chips.mine]
family = "mine"
devices = ["Mine 1"]
peak.bf16 = { value = 1, unit = "PFLOP/s" }
memory = { value = 64, unit = "GiB" }
memory_bandwidth = { low = 1, high = 2, unit = "TB/s", source = "a test", confidence = "measured" }

[instances.mine-4]
chip = "mine"
chips = 4
scale_out = { value = 400, unit = "Gb/s" }

[[instances.mine-4.scale_up]]
topology = "ring"
chips = 4
shape = [4]
bandwidth = { value = 100, unit = "GB/s" }

[instances.mine-4.prices]
owned = { value = 0, unit = "USD/h" }
"""


@pytest.fixture
def mine(tmp_path):
    return tmp_path / "mine.toml"


def figure_tables(table):
    """Every table of a file that states a figure."""
    for value in table.values() if isinstance(table, dict) else table:
        if isinstance(value, dict) and value.keys() & {"value", "low", "high"}:
            yield value
        if isinstance(value, dict | list):
            yield from figure_tables(value)


@pytest.mark.parametrize("file", SHIPPED_FILES, ids=lambda file: file.stem)
def test_every_shipped_figure_says_where_it_comes_from(file):
    figures = list(figure_tables(tomllib.loads(file.read_text(encoding="utf-8"))))
    assert figures
    for figure in figures:
        assert len(figure["source"]) >= 10 and figure["confidence"] in CONFIDENCES and figure["unit"] in UNITS
        if "low" in figure:  # a range that is none hides a dispute that is none
            assert figure["low"] < figure["high"]


def test_files_do_not_overwrite_each_other():
    tables = [tomllib.loads(file.read_text(encoding="utf-8")) for file in SHIPPED_FILES]
    for group, known in (
        ("chips", CATALOG.chips),
        ("instances", CATALOG.instances),
        ("figures", CATALOG.figures),
    ):
        assert sum(len(table.get(group, {})) for table in tables) == len(known)


def test_what_the_issue_names_is_there():
    families = {"trainium1", "trainium2", "trainium3", "inferentia2", "a100-40gb", "a100-80gb", "h100", "h200", "b200",
                "b300", "gb200", "gb300"}  # fmt: skip
    assert families <= CATALOG.chips.keys()
    sizes = {
        "trn1.32xlarge": (16, 16), "trn1n.32xlarge": (16, 16), "trn2.48xlarge": (16, 16),
        "trn2u-ultraserver": (64, 64), "trn3-gen1-ultraserver": (64, 64), "trn3-gen2-ultraserver": (144, 144),
        "inf2.48xlarge": (12, 12), "p4d.24xlarge": (8, 8), "p4de.24xlarge": (8, 8), "p5.48xlarge": (8, 8),
        "p5en.48xlarge": (8, 8), "p6-b200.48xlarge": (8, 8), "gb200-nvl72": (72, 72),
    }  # fmt: skip
    for name, (chips, domain) in sizes.items():
        cluster = CATALOG.cluster(f"{name}:2")
        assert (cluster.chips, cluster.domain) == (2 * chips, domain)
        assert cluster.power_w is not None


@pytest.mark.parametrize("kind", CATALOG.chips)
def test_figures_of_a_chip_agree_with_each_other(kind):
    chip = CATALOG.chip(kind)
    peaks = [chip.peak_tflops(precision).high for precision in chip.precisions]
    assert "bf16" in chip.precisions and peaks == sorted(peaks)  # fewer bits are never slower
    assert chip.power_w is not None and (chip.idle_w is None or chip.idle_w.high < chip.power_w.low)
    # FLOP a byte at which reading and computing take as long: 100 to 700 for all of them; else a unit is wrong.
    assert 100 < 1e3 * chip.peak_tflops("bf16").mid / chip.memory_gb_per_s.mid < 700
    assert 30 < chip.memory_gib.mid < 300


# Read off /work/shared/data/hardware_facts.csv by hand, in its units.
@pytest.mark.parametrize(
    ("got", "amount"),
    [
        (CATALOG.chip("trainium1").peak_tflops("bf16"), 191),
        (CATALOG.chip("trainium2").peak_tflops("bf16"), 667),
        (CATALOG.chip("trainium2").peak_tflops("fp8"), 1299),
        (CATALOG.chip("trainium3").peak_tflops("bf16"), 671),
        (CATALOG.chip("trainium3").memory_gb_per_s, 4900),
        (CATALOG.chip("a100-80gb").memory_gb_per_s, 2039),
        (CATALOG.chip("h100").peak_tflops("fp8"), 1978),
        (CATALOG.chip("h200").memory_gb_per_s, 4800),
        (CATALOG.chip("b200").peak_tflops("bf16"), 2250),
        (CATALOG.chip("gb200").power_w, 1200),
        (CATALOG.chip("b300").power_w, 1100),
        (CATALOG.instance("p5.48xlarge").scale_up[0].gb_per_s, 450),
        (CATALOG.instance("trn2.48xlarge").scale_out_gb_per_s, 25),
        (CATALOG.cluster("trn1.32xlarge:2").price_per_hour("on-demand"), 43.0),
        (CATALOG.cluster("trn2.48xlarge").price_per_hour("capacity-block"), 35.7608),
        (CATALOG.cluster("p5.48xlarge").price_per_hour("capacity-block"), 47.76),
        (CATALOG.cluster("p5en.48xlarge").price_per_hour("on-demand"), 63.296),
        (CATALOG.cluster("p6-b200.48xlarge").price_per_hour("capacity-block"), 113.664),
        (CATALOG.figure("pue"), 1.15),
    ],
)
def test_figures_are_those_of_the_facts(got, amount):
    assert not got.is_range and got.mid == pytest.approx(amount)


def test_disputed_figures_are_ranges():
    gen2 = CATALOG.instance("trn3-gen2-ultraserver")
    disputed = [CATALOG.chip(f"trainium{n}").power_w for n in (1, 2, 3)] + [
        link.gb_per_s for link in gen2.scale_up
    ]
    assert all(figure.is_range for figure in disputed)
    # 704 GB/s read as both directions, and what the links carry each way, lie within.
    assert [link.gb_per_s.low for link in gen2.scale_up] == [128, 160, 64]
    assert all(link.gb_per_s.high > 2 * link.gb_per_s.low for link in gen2.scale_up)
    assert CATALOG.instance("p5.48xlarge").price("capacity-block").seen == (39.33, 47.76)


def test_a_users_file_replaces_single_figures_and_adds_its_own(mine):
    price = '[instances."p5.48xlarge".prices.on-demand]\nvalue = 31.5\nunit = "USD/h"\ndate = 2026-11-20\n'
    mine.write_text(MINE + price)
    catalog = load_catalog(mine)
    price = catalog.cluster("p5.48xlarge:2").price_per_hour("on-demand")
    assert (price.mid, price.source, price.confidence, price.date) == (63.0, str(mine), "user", "2026-11-20")
    assert catalog.instance("p5.48xlarge").price("spot") == CATALOG.instance("p5.48xlarge").price("spot")
    cluster = catalog.cluster("mine-4:2")
    assert cluster.chip.peak_tflops("bf16").mid == 1000.0
    assert (cluster.chip.memory_gb_per_s.low, cluster.chip.memory_gb_per_s.confidence) == (1000.0, "measured")
    assert cluster.link(8).gb_per_s.mid == pytest.approx(12.5) and cluster.link(4).topology == "ring"
    assert cluster.price_per_hour("owned").mid == 0.0 and cluster.power_w is None
    assert load_catalog() == CATALOG, "the shipped catalog stays as it was"


def test_a_price_replaced_takes_its_history_along(mine):
    mine.write_text('instances."p5.48xlarge".prices.capacity-block = { low = 40, high = 41, unit = "USD/h" }')
    assert load_catalog(mine).instance("p5.48xlarge").price("capacity-block").seen == (40.0, 41.0)


@pytest.mark.parametrize(
    ("toml", "path", "problem"),
    [
        ('chips.h100.peak.bf16 = { value = 0, unit = "TFLOP/s" }', "chips.h100.peak.bf16.value", "above 0"),
        ('chips.h100.peak.bf16 = { value = 989 }', "chips.h100.peak.bf16.unit", "missing; give one of GFLOP/s"),
        ('chips.h100.memory = { value = 80, unit = "W" }', "chips.h100.memory.unit", "'W' is none of MiB, GiB"),
        ('chips.h100.memory = { value = "80", unit = "GiB" }', "chips.h100.memory.value", "'80' is not a number"),
        ('chips.h100.memory = { value = true, unit = "GiB" }', "chips.h100.memory.value", "True is not a number"),
        ('chips.h100.memory = { value = 1' + 400 * "0" + ', unit = "GiB" }', "chips.h100.memory.value", "too large"),
        ('chips.h100.memory = { value = nan, unit = "GiB" }', "chips.h100.memory.value", "finite"),
        ('chips.h100.memory = { low = 9, high = 8, unit = "GiB" }', "chips.h100.memory.low", "9 is above high, 8"),
        ('chips.h100.memory = { low = 9, unit = "GiB" }', "chips.h100.memory.high", "missing"),
        ('chips.h100.memory = { value = 9, low = 9, unit = "GiB" }', "chips.h100.memory.value", "not both"),
        ('chips.h100.memory = 80', "chips.h100.memory", "80 is not a table"),
        ('chips.h100.memory = { value = 1, unit = "GiB", confidence = "sure" }', "memory.confidence", "'sure'"),
        ('chips.h100.memory = { value = 1, unit = "GiB", source = "" }', "chips.h100.memory.source", "empty"),
        ('chips.h100.memory = { value = 1, unit = "GiB", date = "May" }', "chips.h100.memory.date", "'May'"),
        ('chips.h100.memory = { value = 1, units = "GiB" }', "chips.h100.memory.units", "Did you mean unit?"),
        ('chips.h100.peak.bf8 = { value = 1, unit = "TFLOP/s" }', "chips.h100.peak.bf8", "fp32, bf16, fp8, fp4"),
        ('chips.h100.familly = "hopper"', "chips.h100.familly", "Did you mean family?"),
        ('chips.new.family = "new"', "chips.new.peak", "missing"),
        ('chips = 3', "chips", "3 is not a table"),
        ('chip.h100.family = "hopper"', "chip", "Did you mean chips?"),
        ('chips.h100.devices = ["H100", 1]', "chips.h100.devices[1]", "1 is not a text"),
        ('instances.new.chip = "h100"', "instances.new.chips", "missing; give a whole number"),
        ('instances."p5.48xlarge".chip = "h10"', 'instances."p5.48xlarge".chip', "Did you mean h100?"),
        ('instances."p5.48xlarge".chips = 8.5', 'instances."p5.48xlarge".chips', "8.5 is not a whole number"),
        ('instances."p5.48xlarge".chips = 0', 'instances."p5.48xlarge".chips', "must be at least 1"),
        ('instances."p5.48xlarge".chips = 12', 'instances."p5.48xlarge".chips', "12 chips .* domains of 8"),
        ('instances."p5.48xlarge".prices.on-demand = { value = -3, unit = "USD/h" }',
         "prices.on-demand.value", "-3 must be finite and not negative"),
        ('instances."p5.48xlarge".prices.on-demnd = { value = 3, unit = "USD/h" }',
         "prices.on-demnd", "Did you mean on-demand?"),
        ('[instances."p5.48xlarge".prices.spot]\nvalue = 3\nunit = "USD/h"\nhistory = [{ value = -1, unit = "USD/h" }]',
         "prices.spot.history[0].value", "not negative"),
        ('[[instances."p5.48xlarge".scale_up]]\ntopology = "star"\nchips = 8\nbandwidth = { value = 1, unit = "GB/s" }',
         "scale_up[0].topology", "'star'"),
        ('[[instances."p5.48xlarge".scale_up]]\ntopology = "ring"\nchips = 8\nshape = [4]\n'
         'bandwidth = { value = 1, unit = "GB/s" }', 'instances."p5.48xlarge".scale_up', "4 of 1 are not 8 chips"),
        ('figures.pue = { value = 1.1, unit = "percent" }', "figures.pue.unit", "'percent'"),
    ],
)  # fmt: skip
def test_one_error_names_the_file_and_the_fields_path(mine, toml, path, problem):
    mine.write_text(toml)
    with pytest.raises(CatalogError, match=problem) as raised:
        load_catalog(mine)
    assert str(raised.value).startswith(raised.value.setting) and raised.value.setting.endswith(path)
    assert str(mine) in str(raised.value)


@pytest.mark.parametrize("content", [b"chips.h100 = ", b"[chips]\n[chips]\n", b"\xff\xfe"])
def test_what_is_no_toml_is_told_with_its_line(mine, content):
    mine.write_bytes(content)
    with pytest.raises(CatalogError, match=f"{mine} is no readable TOML file: ."):
        load_catalog(mine)


def test_a_file_that_is_not_there_is_told(mine):
    with pytest.raises(CatalogError, match=f"{mine} is no readable TOML file: .*No such file"):
        load_catalog(mine)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("p5.48xlrge:4", r"instance: .*Did you mean p5.48xlarge\? It has .*trn2.48xlarge.*cpu"),
        ("trn2u", "Did you mean trn2u-ultraserver"),
        ("P5.48XLARGE", "Did you mean p5.48xlarge"),
        ("zzzz", "instance: the catalog has no 'zzzz'. It has"),
        ("p5.48xlarge:0", "nodes: 0"),
        ("p5.48xlarge:", "cluster: "),
        ("p5.48xlarge:-1", "cluster: "),
        ("p5.48xlarge:1" + 5000 * "0", "cluster: "),
        ("p5.48xlarge:four", "cluster: 'p5.48xlarge:four'"),
        ("", "instance: "),
    ],
)
def test_what_is_no_cluster_is_told_with_what_there_is(text, told):
    with pytest.raises(ConfigError, match=told):
        CATALOG.cluster(text)


def test_an_unknown_chip_or_figure_is_told_with_what_there_is():
    with pytest.raises(ConfigError, match=r"chip: .*'h10'\. Did you mean h100"):
        CATALOG.chip("h10")
    with pytest.raises(ConfigError, match=r"figure: .*electricity"):
        CATALOG.figure("power")


FIGURES = st.builds(
    lambda low, more, unit, confidence, date: Figure(low, low + more, unit, 'a "source"\\', confidence, date),
    st.floats(1e-3, 1e6), st.floats(0, 1e6), st.sampled_from(sorted(UNITS)), st.sampled_from(CONFIDENCES),
    st.sampled_from(["", "2026", "2026-10", "2026-10-07"]),
)  # fmt: skip


@given(figure=FIGURES)
def test_any_figure_comes_back_from_a_file(tmp_path_factory, figure):
    file = Path(tmp_path_factory.getbasetemp()) / "figure.toml"
    date = f'date = "{figure.date}"\n' if figure.date else ""
    file.write_text(
        f"[figures.any]\nlow = {figure.low!r}\nhigh = {figure.high!r}\nunit = '{figure.unit}'\n"
        f"source = '{figure.source}'\nconfidence = '{figure.confidence}'\n{date}"
    )
    table = Table({}, (), {})
    table.add(read_toml(file), file)
    assert figure_of(table.table("figures").table("any")) == figure.in_base()


def test_precisions_are_named_as_all_over_the_project():
    assert PRECISIONS == ("fp32", "bf16", "fp8", "fp4")
