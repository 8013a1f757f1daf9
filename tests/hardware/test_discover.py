"""Accelerators are found by what their drivers say, on trees and programs that say it as drivers do."""

import pytest

from anabranch.hardware.catalog import load_catalog
from anabranch.hardware.discover import accelerators

CATALOG = load_catalog()


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Installs a program that answers as nvidia-smi."""

    def install(script):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    return install


def neuron(root, names):
    for i, name in enumerate(names):
        folder = root / f"neuron{i}" / "info" / "architecture"
        folder.mkdir(parents=True)
        (folder / "device_name").write_text(f"{name}\n")
    return root


@pytest.mark.parametrize("name", ["Trainium1", "Trainium2", "Trainium3", "Inferentia2"])
def test_neuron_devices_are_counted_in_sysfs(tmp_path, name):
    found = accelerators(CATALOG, neuron(tmp_path, [name] * 16))
    assert found is not None and (found.chip.kind, found.devices) == (name.lower(), 16)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB300", "gb300"),
    ],
)
def test_gpus_are_counted_by_nvidia_smi(tmp_path, smi, name, kind):
    smi('test "$*" = "--query-gpu=name --format=csv,noheader" || exit 1\n' + f"echo '{name}'\n" * 8)
    found = accelerators(CATALOG, tmp_path)
    assert found is not None and (found.chip.kind, found.devices) == (kind, 8)


@pytest.mark.parametrize(
    "script", ["echo 'NVIDIA H100 PCIe'", "echo 'NVIDIA H100 80GB HBM3'; exit 9", "exit 0"]
)
def test_none_is_said_where_the_catalog_knows_none_or_the_driver_fails(tmp_path, smi, script):
    smi(script)
    assert accelerators(CATALOG, tmp_path) is None


def test_none_is_said_without_any_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert accelerators(CATALOG, tmp_path) is None
