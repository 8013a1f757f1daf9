"""Which meter is opened, and what is said of those that cannot be."""

import sys

import pytest

from anabranch.errors import ConfigError
from anabranch.telemetry.energy import check_meter, open_meter
from anabranch.telemetry.energy.rapl import RaplMeter
from anabranch.telemetry.energy.registry import METERS, Kind
from anabranch.telemetry.record import ENERGY_TOLD


def test_automatic_is_rapl_where_it_can_be_read(monkeypatch, tmp_path):
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name, text in {"name": "package-0", "max_energy_range_uj": "1000", "energy_uj": "5"}.items():
        (folder / name).write_text(text)
    monkeypatch.setattr("anabranch.telemetry.energy.registry.RaplMeter", lambda: RaplMeter(tmp_path))
    assert open_meter().source == "rapl"


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])  # no domain, or for root only
def test_automatic_is_the_estimate_where_rapl_cannot_be_read(monkeypatch, error):
    def refuse():
        raise error("energy_uj")

    monkeypatch.setattr("anabranch.telemetry.energy.registry.RaplMeter", refuse)
    assert open_meter().source == "estimate"
    monkeypatch.setitem(METERS, "rapl", Kind(refuse))
    with pytest.raises(ConfigError, match="meter: rapl cannot be read here"):
        open_meter("rapl")  # who asks for it is not given another


def test_zeus_is_imported_only_where_it_is_asked_for():
    for asked in ("auto", "estimate", "model:70,700,0.7"):
        open_meter(asked)
    assert "zeus" not in sys.modules


def test_every_source_has_words():
    assert {open_meter(asked).source for asked in ("estimate", "model:70,700,0.7")} <= ENERGY_TOLD.keys()
    assert METERS.keys() - {"auto"} == ENERGY_TOLD.keys()


@pytest.mark.parametrize(
    "asked", ["", "watts", "neuron", "neuron:many", "neuron:1,2,3", "neuron:-5", "neuron:nan", "rapl:5",
              "model:70,700,1.5"],
)  # fmt: skip
def test_what_is_no_meter_is_told(asked):
    with pytest.raises(ConfigError, match="meter: "):
        check_meter(asked)


def test_what_is_a_meter_passes():
    for asked in ("auto", "neuron:500", "neuron:500,60", "model:70,700,1", "zeus"):
        check_meter(asked)
