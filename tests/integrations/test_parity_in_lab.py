"""Parity on two emulated nodes with a slow link between them; skipped, with its reason, where no lab can be."""

import os
import sys
from pathlib import Path

import pytest
import torch
from tests.integrations.parity import Judge, Layout

from anabranch.lab.cluster import Lab
from anabranch.lab.kernel import available
from anabranch.lab.spec import LabSpec

ROOT = Path(__file__).parents[2]
REASON = available()
BOUND = 1e-5
CELLS = [
    ("mixtral", Layout(fsdp=4, ep=4, planner="exact", transport="two_level")),
    ("qwen3_moe", Layout(fsdp=4, ep=4, planner="bounded", transport="two_level", chunks=2)),
    ("gpt_oss", Layout(fsdp=4, ep=4, planner="bounded", transport="dedup", chunks=3)),
    ("deepseek_v3", Layout(fsdp=4, ep=4, planner="exact", transport="all_to_all")),
    ("olmoe", Layout(fsdp=4, ep=4, planner="auto", transport="auto")),
]


@pytest.mark.skipif(REASON is not None, reason=f"no emulated cluster here: {REASON}")
def test_two_nodes_equal_one_process(judge: Judge, tmp_path: Path) -> None:
    torch.save([(judge.checkpoint(family), layout) for family, layout in CELLS], tmp_path / "request.pt")
    paths = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with Lab(LabSpec(nodes=2, ranks_per_node=2, inter_mbit=200.0, intra_mbit=5_000.0)) as lab:
        status = lab.run(
            [sys.executable, "-m", "tests.integrations.lab_rank", str(tmp_path)],
            {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
            timeout_s=300,
        )
    assert status == 0
    for number, (family, layout) in enumerate(CELLS):
        outcomes = [torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=False) for rank in range(4)]
        errors = judge.errors(outcomes, family, batches=4)
        assert errors.worst <= BOUND, (family, layout, errors)
        assert outcomes[0].guests > 0 or layout.planner == "auto"
