"""The recipe that judges KV policies by long chains: its problems, and the whole of it in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipes.ledger import (
    ACCOUNTS,
    EOS,
    NUMBER,
    SUMS,
    THOUGHT,
    WORDS,
    Ledger,
    ledgers,
    model_config,
    solution,
    solved,
    tokens_of,
)
from recipes.ledger import tokenizer as ledger_tokenizer
from recipes.long_chains import beside, verdict
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent


def test_worked_solutions_are_right() -> None:
    for ledger in ledgers(5, 50, 60):
        worked = solution(ledger)
        assert len(ledger.prompt) + len(worked) == tokens_of(60)
        assert worked[-5:-1:3] == [NUMBER + ledger.total] * 2, "the last sum, and what follows the thought"
        assert solved(ledger, worked)
        assert solved(ledger, [*worked, THOUGHT, EOS]), "what follows its end is not read"
        assert not solved(ledger, worked[:-1])
        assert not solved(ledger, [*worked[:-2], NUMBER + (ledger.total + 1) % SUMS, EOS])
        assert not solved(ledger, [worked[0], NUMBER + (worked[1] - NUMBER + 1) % SUMS, *worked[2:]])
    assert tokens_of(ACCOUNTS) == 4002
    assert len(WORDS) <= model_config().vocab_size


def test_a_solution_goes_from_neighbour_to_neighbour() -> None:
    words = " ".join(WORDS[t] for t in solution(Ledger(((18, 9), (17, 4)))))
    assert words == "a17 4 + 0 = 4 ; a18 9 + 4 = 3 ; </think> 3 <eos>"
    (ledger,) = ledgers(3, 1, 10)
    numbers = [number for number, _ in ledger.accounts]
    assert sorted(numbers) == list(range(min(numbers), min(numbers) + 10)) != numbers


def test_seeds_do_not_overlap_and_accounts_are_met_once() -> None:
    first, second = ledgers(0, 2, 300)
    assert ledgers(1, 1, 300) == [second]
    assert first != second
    assert len({account for account, _ in first.accounts}) == 300


def test_the_tokenizer_reads_what_the_problems_hold(tmp_path: Path) -> None:
    ledger_tokenizer().save_pretrained(tmp_path)
    kept = AutoTokenizer.from_pretrained(tmp_path)
    (ledger,) = ledgers(5, 1, 3)
    whole = [*ledger.prompt, *solution(ledger)]
    assert kept(" ".join(WORDS[token] for token in whole)).input_ids == whole


def _rows(*policies: tuple[float, int, list[bool]]) -> list[dict[str, object]]:
    """Of share, chains and what was solved."""
    return beside(
        [
            {
                "share": share, "chains_in_2_gib": chains, "chains_with_open_pages": chains, "right": right,
                "solve_rate": sum(right) / len(right),
            }
            for share, chains, right in policies
        ]
    )  # fmt: skip


def test_policies_are_compared_problem_by_problem() -> None:
    all_, one_less, other = [True] * 100, [False] + [True] * 99, [True] * 98 + [False] * 2
    rows = _rows((1.0, 10, all_), (1.0, 20, one_less), (0.5, 40, all_))
    assert [(r["chains_ratio"], r["points_lost"], r["lost"], r["won"]) for r in rows] == [
        (1, 0, 0, 0), (2, 1, 1, 0), (4, 0, 0, 0),
    ]  # fmt: skip
    assert verdict(rows) == []
    [line] = verdict(_rows((1.0, 10, all_), (1.0, 20, other), (0.5, 40, all_)))
    assert "keeps all holds 2 times" in line
    [line] = verdict(_rows((1.0, 10, all_), (1.0, 20, all_), (0.5, 39, all_)))
    assert "evicts holds 4 times" in line
    poor = [False] * 60 + [True] * 40
    [line] = verdict(_rows((1.0, 10, poor), (1.0, 20, poor), (0.5, 40, poor)))
    assert "40% solved" in line


@pytest.mark.full
def test_the_recipe_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.long_chains", "--quick", "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, capture_output=True)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert rows[1]["chains_in_2_gib"] == 2 * rows[0]["chains_in_2_gib"]
    assert [row["evicted"] > 0 for row in rows] == [row["share"] < 1 for row in rows]
    assert all(0 <= row["solve_rate"] <= 1 for row in rows)
