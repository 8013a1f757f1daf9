"""Joules that follow from seconds."""

import time

import pytest

from anabranch.telemetry.energy.estimate import CORE_POWER_W, EstimateMeter, ModelMeter


def test_the_estimate_is_cpu_seconds_times_watts(monkeypatch):
    monkeypatch.setattr(time, "process_time", iter([10.0, 10.0, 12.5]).__next__)
    meter = EstimateMeter()
    assert meter.joules() == 0.0
    assert meter.joules() == 2.5 * CORE_POWER_W


def test_a_chips_watts_lie_between_idle_and_most(monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter([10.0, 12.0]).__next__)
    assert ModelMeter(70.0, 700.0, 0.5).joules() == pytest.approx(2.0 * 385.0)
