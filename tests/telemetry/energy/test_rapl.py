"""RAPL against a fake sysfs tree, wrap-around included."""

import pytest

from anabranch.telemetry.energy.rapl import RaplMeter

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
