"""This machine as an instance: measured, plausible, and a cluster like any other."""

import os

import pytest

from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.processor import measure_cpu, network_gb_per_s

CPU = measure_cpu()


def test_speeds_are_measured_and_plausible():
    peak, memory = CPU.chip.peak_tflops("fp32"), CPU.chip.memory_gb_per_s
    assert peak.confidence == memory.confidence == "measured" and "this machine" in peak.source
    # Wide enough for a machine that is busy elsewhere; a wrong unit is a factor of a thousand off.
    assert 1e-4 < peak.mid < len(os.sched_getaffinity(0))
    assert 0.05 < memory.mid < 2000
    assert 0.1 < CPU.chip.memory_gib.mid <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert CPU.chip.power_w is not None and CPU.chip.power_w.is_range


def test_the_catalog_measures_this_machine_once():
    catalog = load_catalog()
    assert "cpu" in catalog.names and catalog.instance("cpu") is catalog.instance("cpu")
    cluster = catalog.cluster("cpu:1")
    assert (cluster.chips, cluster.domain, cluster.chip.family) == (1, 1, "cpu")
    with pytest.raises(ConfigError, match="no on-demand price of cpu is known; it has none"):
        cluster.price_per_hour("on-demand")
    with pytest.raises(ConfigError, match="no bf16 peak of cpu; it has fp32"):
        cluster.chip.peak_tflops("bf16")


def test_the_fastest_physical_card_counts(tmp_path):
    for name, speed, physical in (("eth0", "10000", True), ("eth1", "25000", True), ("veth", "99999", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(f"{speed}\n")
        if physical:
            (tmp_path / name / "device").mkdir()
    assert network_gb_per_s(tmp_path) == 25.0 / 8
    (tmp_path / "eth1" / "speed").write_text("-1\n")
    (tmp_path / "eth0" / "speed").unlink()
    assert network_gb_per_s(tmp_path) is None
