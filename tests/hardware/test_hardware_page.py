"""docs/hardware.md tells the truth: its code runs, its file loads, its disputed figures are the catalog's."""

import re
import tomllib
from pathlib import Path

import pytest

from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.table import SHIPPED

PAGE = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")


def block(language):
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return code


def test_its_code_runs(capsys):
    exec(compile(block("python"), "docs/hardware.md", "exec"), {})
    assert capsys.readouterr().out.startswith("64 16 667 TFLOP/s, ")


def test_its_file_loads_and_says_what_the_page_says(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(block("toml"))
    catalog = load_catalog(file)
    assert catalog.cluster("lab-node:2").price_per_hour("owned").mid == 18.0
    assert catalog.instance("p5.48xlarge").price("on-demand").usd_per_h.confidence == "user"
    assert str(catalog.chip("trainium2").power_w) == "480..520 W"


def test_its_error_is_the_one_that_is_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('instances."p5.48xlarge".prices.on-demand = { value = -3, unit = "USD/h" }')
    with pytest.raises(ValueError, match="not negative") as raised:
        load_catalog(Path("mine.toml"))
    assert f"`{raised.value}`" in PAGE


@pytest.mark.parametrize(
    ("path", "stated"), re.findall(r"^\| `(\w+\.[^`]+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
)
def test_disputed_figures_are_the_catalogs(path, stated):
    files = [tomllib.loads(file.read_text(encoding="utf-8")) for file in SHIPPED.glob("*.toml")]
    group, rest = path.split(".", 1)
    name = max(
        (name for file in files for name in file.get(group, {}) if rest.startswith(f"{name}.")), key=len
    )
    figure = next(file[group][name] for file in files if name in file.get(group, {}))
    for key in re.findall(r"\w+", rest.removeprefix(f"{name}.")):
        figure = figure[int(key) if key.isdigit() else key]
    assert stated == f"{figure['low']:g}..{figure['high']:g} {figure['unit']}"
