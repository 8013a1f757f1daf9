"""Sums of several numbers, from reasoning-gym (`chain_sum`), worked out term by term: problems, their tokens, their
solutions in writing, and the verdict on an answer.

A problem reads `55+98-93=<think>`, its solution `55+98=153;153-93=60</think>60<eos>`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import reasoning_gym
from recipes.tiny import EOS, SPECIAL, THINK, THOUGHT, moe_config, word_tokenizer
from tokenizers import Regex
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

CHARACTERS = "0123456789+-=;"
MAX_NEW_TOKENS = 40
# As reasoning-gym's settings; a seed's problem i is that of seed + i, so ranges of seeds must not overlap.
SETTINGS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


@dataclass(frozen=True)
class Problem:
    """A problem of reasoning-gym and its prompt in tokens."""

    entry: dict[str, Any]
    prompt: tuple[int, ...]

    @property
    def expression(self) -> str:
        """Without blanks, as the prompt has it."""
        return self.entry["metadata"]["expression"].replace(" ", "")


def problems(seed: int, count: int) -> list[Problem]:
    """The problems of seeds `seed` to `seed + count`."""
    found = reasoning_gym.create_dataset("chain_sum", seed=seed, size=count, **SETTINGS)
    return [Problem(entry, _prompt(entry)) for entry in found]


def unseen(found: list[Problem], judged: list[Problem]) -> list[Problem]:
    """Those of `found` that no judged problem asks: short sums recur, whatever their seeds."""
    asked = {problem.expression for problem in judged}
    return [problem for problem in found if problem.expression not in asked]


def solution(problem: Problem) -> list[int]:
    """The worked solution in tokens: the running sum after each term, then the answer."""
    parts = problem.entry["metadata"]["expression"].split()
    sums = [int(parts[0])]
    for sign, term in zip(parts[1::2], parts[2::2], strict=True):
        sums.append(sums[-1] + int(term) * (1 if sign == "+" else -1))
    signed = ["".join(pair) for pair in zip(parts[1::2], parts[2::2], strict=True)]
    lines = [f"{before}{term}={after}" for (before, after), term in zip(pairwise(sums), signed, strict=True)]
    return [*encode(";".join(lines)), THOUGHT, *encode(str(sums[-1])), EOS]


def answer(tokens: list[int]) -> str | None:
    """What a sample answers: the text between the end of its thought and its end; None where either is missing."""
    if THOUGHT not in tokens or tokens[-1] != EOS:
        return None
    return "".join(_text(token) for token in tokens[tokens.index(THOUGHT) + 1 : -1])


def solved(problem: Problem, given: str | None) -> bool:
    """reasoning-gym's verdict; its part of a point for a wrong answer counts as wrong."""
    return VERIFIER.score_answer(given, problem.entry) == 1.0


def encode(text: str) -> list[int]:
    """Tokens of characters."""
    return [len(SPECIAL) + CHARACTERS.index(c) for c in text]


def tokenizer() -> PreTrainedTokenizerFast:
    """For `save_pretrained`: the same tokens as `encode`, and as text."""
    return word_tokenizer((*SPECIAL, *CHARACTERS), Split(Regex("."), "isolated"), Fuse())


def model_config() -> Qwen3MoeConfig:
    """1.3 M parameters, 0.4 M of them at work for a token."""
    return moe_config(32, 3, 256)


def _prompt(entry: dict[str, Any]) -> tuple[int, ...]:
    return (*encode(entry["metadata"]["expression"].replace(" ", "") + "="), THINK)


def _text(token: int) -> str:
    return CHARACTERS[token - len(SPECIAL)] if len(SPECIAL) <= token < len(SPECIAL) + len(CHARACTERS) else "?"


VERIFIER = reasoning_gym.create_dataset("chain_sum", seed=0, size=1, **SETTINGS)
