"""`anabranch bench kv`: needles are what they are said to be, and a policy that changes nothing measures nothing."""

import heapq
import inspect
import json
import re

import pytest
from typer.testing import CliRunner

from anabranch.cli.bench_kv import POLICIES, PROMPT_TOKENS, find_needles
from anabranch.cli.main import app

WORDS = re.compile(r"\w+|\W")


def spans_of(text: str) -> list[tuple[int, int]]:
    """Tokens of up to three characters, as a tokenizer would cut words."""
    return [
        (at, min(at + 3, word.end()))
        for word in WORDS.finditer(text)
        for at in range(word.start(), word.end(), 3)
    ]


def test_a_needle_is_a_name_last_written_long_before():
    filler = "x = 1\n" * 100
    text = filler[:240] + "needle_one = 2\n" + filler + "needle_one\n" + "needle_one\n"
    spans = spans_of(text)
    (tokens,) = find_needles(text, spans, distance=200)
    assert "".join(text[slice(*spans[i])] for i in tokens) == "dle_one"
    assert spans[tokens[0]][0] == text.index("needle_one", 300) + 3
    # Too near, in the prompt, or too short.
    assert find_needles(text, spans, distance=5000) == []
    early = "needle_one\n" + filler + "needle_one\n"
    assert find_needles(early, spans_of(early), distance=200) == []
    assert len(find_needles(text.replace("needle_one", "one"), spans, distance=200)) == 0
    assert PROMPT_TOKENS < 80


def test_real_text_has_needles():
    text = inspect.getsource(heapq)
    spans = spans_of(text)
    for needle in find_needles(text, spans, distance=256):
        word = re.search(r"\w+$", text[: spans[needle[-1]][1]]).group()
        start = spans[needle[-1]][1] - len(word)
        before = [m.start() for m in re.finditer(rf"\b{word}\b", text) if m.start() < start][-1]
        assert sum(before <= at < start for at, _ in spans) >= 256


@pytest.mark.full
def test_the_bench_measures_every_policy(tmp_path):
    file = tmp_path / "kv.json"
    result = CliRunner().invoke(app, ["bench", "kv", "--quick", "--tokens", "640", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["policy"] for row in rows] == [policy.name for policy in POLICIES]
    full, by_name = rows[0], {row["policy"]: row for row in rows}
    assert full["kl"] == 0 and full["same_best_token"] == 1
    assert 0 < by_name["int8"]["kl"] < by_name["int4"]["kl"] < by_name["evict 1/4"]["kl"]
    assert by_name["evict 1/4"]["evicted_share"] > by_name["evict 1/2"]["evicted_share"] > 0
    assert by_name["evict 1/4 + int8"]["chains_4k_in_2_gib"] >= 4 * by_name["bf16"]["chains_4k_in_2_gib"]
