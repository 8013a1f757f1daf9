"""The shape of a lab: rates as people write them, one canonical line, and what cannot be."""

import pytest

from anabranch.errors import ConfigError
from anabranch.lab.spec import LabSpec, format_rate, parse_rate


@pytest.mark.parametrize(
    ("text", "mbit"),
    [("500mbit", 500.0), ("5gbit", 5000.0), ("1.5Gbit", 1500.0), ("2500kbit", 2.5), ("none", None)],
)
def test_rates_are_read_as_tc_writes_them(text, mbit):
    assert parse_rate(text, "inter") == mbit


@pytest.mark.parametrize("text", ["", "500", "fast", "5 gbit/s", "-1mbit", "1e3mbit", "5gbyte"])
def test_what_is_no_rate_is_refused_by_its_setting(text):
    with pytest.raises(ConfigError, match=r"inter: .*write 500mbit"):
        parse_rate(text, "inter")


@pytest.mark.parametrize("mbit", [1.0, 200.0, 999.5, 1000.0, 2500.0, 12_345.678, None])
def test_a_canonical_rate_is_read_back(mbit):
    assert parse_rate(format_rate(mbit), "inter") == mbit


def test_equal_shapes_have_one_line():
    written = LabSpec(2, 2, parse_rate("0.2gbit", "inter"), parse_rate("5000mbit", "intra"), 0.450)
    assert str(written) == "2x2 inter=200mbit intra=5gbit cpu=0.45"
    assert str(LabSpec(4, 1)) == "4x1 inter=none intra=none cpu=none"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"nodes": 0}, "nodes"),
        ({"nodes": 65}, "nodes"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"inter_mbit": 0.0}, "inter"),
        ({"intra_mbit": 1e9}, "intra"),
        ({"cpu": 0.05}, "cpu"),
        ({"cpu": 65.0}, "cpu"),
    ],
)
def test_shapes_that_cannot_be_name_the_setting(settings, named):
    with pytest.raises(ConfigError) as raised:
        LabSpec(**settings)
    assert raised.value.setting == named


def test_more_quota_than_cores_is_told():
    assert LabSpec(2, 2, cpu=0.475).too_much_for(2) is None
    assert LabSpec(2, 2).too_much_for(1) is None
    told = LabSpec(2, 2, cpu=0.5).too_much_for(2)
    assert told is not None and "--cpu 0.47 or less" in told
