"""The meter over zeus, against a stand-in with zeus 0.16's windows: no GPU is here, and zeus is an extra."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from anabranch.errors import ConfigError
from anabranch.telemetry.energy.zeus import ZeusMeter


class Monitor:
    """Windows over the counters of two GPUs, in joules; a window must be open to be closed."""

    counters = (1000.0, 5000.0)

    def __init__(self, gpu_indices=None, cpu_indices=None):
        assert cpu_indices == [], "processors are RAPL's"
        self.gpu_indices = list(range(len(Monitor.counters))) if gpu_indices is None else gpu_indices
        self.open = {}

    def begin_window(self, key, sync_execution=True):
        assert key not in self.open and not sync_execution
        self.open[key] = [Monitor.counters[i] for i in self.gpu_indices]

    def end_window(self, key, sync_execution=True):
        assert not sync_execution
        began = self.open.pop(key)
        used = sum(Monitor.counters[i] for i in self.gpu_indices) - sum(began)
        if used == 0:
            warnings.warn("The energy consumption of one or more GPUs was measured as zero.", stacklevel=2)
        return SimpleNamespace(total_energy=used)


@pytest.fixture
def zeus(monkeypatch):
    module = ModuleType("zeus.monitor")
    monkeypatch.setattr(module, "ZeusMonitor", Monitor, raising=False)
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


@pytest.mark.parametrize(("rank", "expected"), [("0", 20.0), ("1", 9.0)])
def test_each_rank_counts_its_own_gpu(zeus, monkeypatch, rank, expected):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(Monitor, "counters", (1000.0, 5000.0))
    meter = ZeusMeter()
    assert meter.joules() == 0.0
    monkeypatch.setattr(Monitor, "counters", (1015.0, 5004.0))
    meter.joules()
    monkeypatch.setattr(Monitor, "counters", (1020.0, 5009.0))
    assert meter.joules() == expected


def test_without_a_gpu_there_is_no_meter(zeus, monkeypatch):
    monkeypatch.setattr(Monitor, "counters", ())
    with pytest.raises(ConfigError, match="no GPU"):
        ZeusMeter()


def test_without_zeus_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    with pytest.raises(ConfigError, match=r"anabranch\[energy\]"):
        ZeusMeter()
