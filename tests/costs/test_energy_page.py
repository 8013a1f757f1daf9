"""docs/energy.md tells the truth: its code runs, and its figures are the code's."""

import re
from pathlib import Path

import numpy as np

from anabranch.costs import energy
from anabranch.costs.energy import power_of
from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.figure import Figure
from anabranch.telemetry.energy.registry import METERS

PAGE = (Path(__file__).parents[2] / "docs" / "energy.md").read_text(encoding="utf-8")


def test_its_code_runs(capsys):
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(code, "docs/energy.md", "exec"), scope)
    out = capsys.readouterr().out
    assert "USD" in out and "engineering hours: none given" in out


def test_its_constants_are_the_codes():
    assert f"{energy.FLOOR} + {1 - energy.FLOOR:.2f} x min(1, u / {energy.FULL})" in PAGE
    assert f"±{100 * energy.MODEL_ERROR:.1f} %" in PAGE
    rack = Figure(1.0, 1.0, "ratio", "no building", "user")
    low, mid, high = (
        w[0] / 1e3 for w in power_of(load_catalog().cluster("dgx-h100"), rack).busy_w(np.array([0.4]))
    )
    assert f"{mid:.1f} kW (low {low:.1f}, high {high:.1f})" in PAGE


def test_it_names_every_meter():
    for name, kind in METERS.items():
        assert f"`{name}{kind.form}`" in PAGE
