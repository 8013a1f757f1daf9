"""Ledgers: neighbouring accounts in any order, worked through one by one, so that a chain is as long as one likes and
its answer right only where every step is.

A problem reads `a18 9 a17 4 a17 a18 <think>`: what each account holds, and which to begin and to end with. Its solution
is `a17 4 + 0 = 4 ; a18 9 + 4 = 3 ; </think> 3 <eos>`: of each account, in the order of their numbers, what it holds, to
be found anywhere in the problem, the sum so far and the sum with it, of both the last digit. Every number is one token,
and so is every account. What an account holds follows it in both, which a model is quick to see; with a colon in
between it was not. With sums of a hundred most of what was left to learn were sums.
"""

import random
from dataclasses import dataclass

import torch
from recipes.tiny import EOS, SPECIAL, THINK, THOUGHT, moe_config, word_tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

SIGNS = ("+", "=", ";")
SUMS, ACCOUNTS = 10, 444
WORDS = (*SPECIAL, *SIGNS, *map(str, range(SUMS)), *(f"a{i}" for i in range(ACCOUNTS)))
PLUS, EQUALS, SEMICOLON = range(len(SPECIAL), len(SPECIAL) + len(SIGNS))
NUMBER, ACCOUNT = len(SPECIAL) + len(SIGNS), len(SPECIAL) + len(SIGNS) + SUMS
# Scores are four times as large as usual.
SHARP = 2.0
# Pairs of channels turn by 1 down to 1 / THETA a token. At the usual 10,000 hardly one is the same from a hundred and
# from four thousand tokens away, and a look-up learnt in ledgers of 120 accounts missed three of four among 444.
THETA = 1e7
# Tokens of an account in a problem, and in its solution; and those around them.
ASKED, WORKED, AROUND = 2, 7, 6


@dataclass(frozen=True)
class Ledger:
    """accounts: (account, what it holds), neighbours, each once."""

    accounts: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """In tokens."""
        holdings = (t for account, held in self.accounts for t in (ACCOUNT + account, NUMBER + held))
        numbers = [account for account, _ in self.accounts]
        return (*holdings, ACCOUNT + min(numbers), ACCOUNT + max(numbers), THINK)

    @property
    def total(self) -> int:
        return sum(held for _, held in self.accounts) % SUMS


def ledgers(seed: int, count: int, accounts: int, numbers: int = ACCOUNTS) -> list[Ledger]:
    """The problems of seeds `seed` to `seed + count`. numbers: only the first so many accounts are met."""
    made: list[Ledger] = []
    for number in range(seed, seed + count):
        draw = random.Random(number)
        first = draw.randrange(numbers - accounts + 1)
        order = draw.sample(range(first, first + accounts), accounts)
        made.append(Ledger(tuple((number, draw.randrange(10)) for number in order)))
    return made


def solution(ledger: Ledger) -> list[int]:
    """The worked solution in tokens."""
    tokens, total = list[int](), 0
    for account, held in sorted(ledger.accounts):
        before, total = total, (total + held) % SUMS
        tokens += [
            ACCOUNT + account,
            NUMBER + held,
            PLUS,
            NUMBER + before,
            EQUALS,
            NUMBER + total,
            SEMICOLON,
        ]
    return [*tokens, THOUGHT, NUMBER + ledger.total, EOS]


def solved(ledger: Ledger, tokens: list[int]) -> bool:
    """Whether every step is right, and with it the total, which alone is right by luck one time in ten. What follows
    the first end is not read."""
    return EOS in tokens and tokens[: tokens.index(EOS) + 1] == solution(ledger)


def tokens_of(accounts: int) -> int:
    """Of a whole chain, the problem included."""
    return accounts * (ASKED + WORKED) + AROUND


def tokenizer() -> PreTrainedTokenizerFast:
    """For `save_pretrained`: the same tokens, and as text."""
    return word_tokenizer(WORDS, WhitespaceSplit())


def model_config() -> Qwen3MoeConfig:
    """1.8 M parameters, 0.6 M of them at work for a token."""
    config = moe_config(464, 4, 8192)
    config.rope_parameters["rope_theta"] = THETA
    return config


def sharpen(model: PreTrainedModel) -> None:
    """Let attention pick one token of thousands from the start.

    Queries and keys are normalised here, to a length that their norms' weights set. At 1, the usual beginning, a score
    is at most sqrt(32), and e^5.7 is 290: one token of 4,000 cannot draw more than a fifteenth. An optimizer that moves
    every weight by 0.001 a step takes a thousand steps to where a look-up is possible at all.
    """
    for name, weights in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weights, SHARP)
