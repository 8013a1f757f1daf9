"""Neuron's percentage of power on a tree of files in the driver's layout, with lines recorded on a device."""

import time

import pytest

from anabranch.telemetry.energy.neuron import NeuronMeter

# Of a trn1/inf2 device, idle and under load (public measurement notes, text 67106098503); the minute is ours.
IDLE = "POWER_STATUS_VALID,1756000020,0.00,2.06,0.56\n"
LOAD = "POWER_STATUS_VALID,1756000080,0.86,25.00,18.86\n"
NOTHING = "POWER_STATUS_NO_DATA,1756000140,0.00,0.00,0.00\n"


@pytest.fixture
def devices(tmp_path):
    """Sets the line of each of two devices."""

    def tell(*lines):
        for number, line in enumerate(lines):
            folder = tmp_path / f"neuron{number}" / "stats" / "power"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "utilization").write_text(line)
        return tmp_path

    (tmp_path / "neuron0" / "info").mkdir(parents=True)
    return tell


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the meter was made, as a list of one."""
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_watts_are_the_mean_share_of_what_the_user_states(devices, clock):
    meter = NeuronMeter(500.0, root=devices(LOAD, IDLE))
    assert meter.joules() == 0.0
    clock[0] = 10.0
    assert meter.joules() == pytest.approx(10.0 * 500.0 * (0.1886 + 0.0056))


def test_background_power_is_beside_the_share(devices, clock):
    meter = NeuronMeter(500.0, 60.0, root=devices(IDLE))
    clock[0] = 1.0
    assert meter.joules() == pytest.approx(60.0 + 500.0 * 0.0056)


def test_each_minute_counts_with_its_own_share(devices, clock):
    meter = NeuronMeter(100.0, root=devices(IDLE))
    clock[0] = 60.0
    before = meter.joules()
    devices(LOAD)
    clock[0] = 120.0
    assert meter.joules() - before == pytest.approx(60.0 * 18.86)


def test_a_device_that_falls_silent_counts_as_before(devices, clock):
    meter = NeuronMeter(100.0, root=devices(LOAD))
    devices(NOTHING)
    clock[0] = 1.0
    assert meter.joules() == pytest.approx(18.86)


def test_without_a_device_or_its_word_there_is_no_meter(devices, tmp_path):
    with pytest.raises(OSError, match="no Neuron device"):
        NeuronMeter(500.0, root=tmp_path)
    with pytest.raises(OSError, match="not told its power yet"):
        NeuronMeter(500.0, root=devices(LOAD, NOTHING))
