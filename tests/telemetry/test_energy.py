"""Meters: RAPL against a fake sysfs tree, wrap-around included, and the estimate where it cannot be read."""

import time

import pytest

from anabranch.telemetry.energy import CORE_POWER_W, EstimateMeter, RaplMeter, open_meter

RANGE_UJ = 262_143_328_850


@pytest.fixture
def powercap(tmp_path):
    """A two-socket powercap tree: packages, their cores, and the platform domain that holds both."""
    for domain, name in [("0", "package-0"), ("0:0", "core"), ("1", "package-1"), ("2", "psys")]:
        folder = tmp_path / f"intel-rapl:{domain}"
        folder.mkdir()
        (folder / "name").write_text(name + "\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text("1000000\n")
    return tmp_path


def set_uj(powercap, domain, energy_uj):
    (powercap / f"intel-rapl:{domain}" / "energy_uj").write_text(f"{energy_uj}\n")


def test_rapl_adds_up_the_packages_and_nothing_inside_or_around_them(powercap):
    meter = RaplMeter(powercap)
    assert meter.joules() == 0.0
    set_uj(powercap, "0", 3_000_000)
    set_uj(powercap, "1", 1_500_000)
    set_uj(powercap, "0:0", 9_000_000)
    set_uj(powercap, "2", 9_000_000)
    assert meter.joules() == 2.5
    assert meter.joules() == 2.5


def test_rapl_goes_on_when_a_counter_wraps(powercap):
    set_uj(powercap, "0", RANGE_UJ - 4_000_000)
    meter = RaplMeter(powercap)
    set_uj(powercap, "0", 2_000_000)
    assert meter.joules() == pytest.approx(6.0)
    set_uj(powercap, "0", 3_000_000)
    assert meter.joules() == pytest.approx(7.0)


def test_the_meter_is_rapl_where_it_can_be_read(powercap):
    assert open_meter(powercap).source == "rapl"


def test_the_meter_is_the_estimate_without_rapl(tmp_path):
    assert open_meter(tmp_path / "powercap").source == "estimate"


def test_the_meter_is_the_estimate_where_rapl_is_for_root_only(powercap, monkeypatch):
    def refuse(file):
        raise PermissionError(file)

    monkeypatch.setattr("anabranch.telemetry.energy._number", refuse)
    assert open_meter(powercap).source == "estimate"


def test_the_estimate_is_cpu_seconds_times_watts(monkeypatch):
    monkeypatch.setattr(time, "process_time", iter([10.0, 10.0, 12.5]).__next__)
    meter = EstimateMeter()
    assert meter.joules() == 0.0
    assert meter.joules() == 2.5 * CORE_POWER_W
