"""The README tells the truth: its tables are the committed results, its example runs, its files exist."""

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from run_distributed import RankPool

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _table_module() -> Any:
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["balance", "codecs", "planner", "validation"])
def test_tables_are_the_committed_results(kind: str) -> None:
    assert _table_module().tables(kind, ROOT / "benchmarks" / "results" / f"{kind}.json") in README


def test_the_grid_is_the_committed_results() -> None:
    files = [
        ROOT / "benchmarks" / "results" / f"cluster_{topology}.json" for topology in ("2x2", "2x4", "4x1")
    ]
    assert _table_module().tables("cluster", *files) in README
    assert all(file.name in README for file in files)


def test_the_table_of_engines_is_the_committed_result() -> None:
    docs = (ROOT / "docs" / "generate.md").read_text()
    assert _table_module().tables("generate", ROOT / "benchmarks" / "results" / "generate_quick.json") in docs


def test_the_page_on_keys_and_values_has_the_committed_table() -> None:
    results = ROOT / "benchmarks" / "results" / "long_chains.json"
    assert _table_module().tables("long_chains", results) in (ROOT / "docs" / "kv.md").read_text()


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def _run_example(script: str, folder: str) -> list[float]:
    text = torch.tensor(list((ROOT / "README.md").read_bytes()[:2048])).view(-1, 32)
    dataset = [{"input_ids": row, "labels": row} for row in text]
    path = Path(folder) / f"example_{dist.get_rank()}.py"
    path.write_text(script.replace("path/to/moe", f"{folder}/moe").replace('"out"', f'"{folder}/out"'))
    space = runpy.run_path(str(path), init_globals={"dataset": dataset})
    return [float(p.float().abs().sum()) for p in (space["model"].lm_head.weight.full_tensor(),)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_example_runs(ranks2: RankPool, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    before = float(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "moe").lm_head.weight.abs().sum())
    first, second = ranks2.run(_run_example, block, str(tmp_path))
    assert first == second != [before], "both ranks hold the same trained weights"


def test_the_page_on_steps_has_the_committed_table() -> None:
    results = ROOT / "benchmarks" / "results" / "validation.json"
    assert _table_module().tables("validation", results) in (ROOT / "docs" / "steps.md").read_text()


@pytest.mark.parametrize("kind", ["memory", "published_memory"])
def test_the_page_on_memory_has_the_committed_tables(kind: str) -> None:
    results = ROOT / "benchmarks" / "results" / "memory.json"
    assert _table_module().tables(kind, results) in (ROOT / "docs" / "memory.md").read_text()
