"""What a hypervisor took, as /proc/stat counts it."""

from pathlib import Path

import pytest

from anabranch.cli import steal
from anabranch.cli.steal import Steal


def test_the_stolen_part_is_of_all_time_since_the_last_look(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(steal, "STAT", stat)
    stat.write_text("cpu  100 0 50 800 0 0 0 10 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    seen = Steal()
    stat.write_text("cpu  150 0 50 840 0 0 0 20 0 0\n")
    assert seen.part() == pytest.approx(0.1)
    assert seen.part() == 0.0
    stat.write_text("cpu  151 0 50 840\n")  # of a kernel that counts no more than these
    assert Steal().part() == 0.0


def test_where_nothing_is_counted_nothing_is_stolen(tmp_path, monkeypatch):
    monkeypatch.setattr(steal, "STAT", tmp_path / "none")
    assert Steal().part() == 0.0


def test_this_machine_counts():
    if not Path("/proc/stat").exists():
        pytest.skip("no /proc/stat here")
    seen = Steal()
    assert 0.0 <= seen.part() <= 1.0
