"""Text as tokens come, with tokenizers trained on real text: byte-level BPE, and SentencePiece's manner."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anabranch.serving.text import BROKEN, Detokenizer, text_of
from anabranch.training.tokens import END_OF_TEXT

TEXT = Path(__file__).read_text(encoding="utf-8")
UNICODE = "Ünïcödé: 😀 naïve 中文 текст €\n"
MANNERS = ("byte_level", "byte_fallback")


@cache
def tokenizer(manner: str) -> PreTrainedTokenizerFast:
    """`byte_level` as GPT-2's; `byte_fallback` as Llama 2's: leading spaces, unknown characters in bytes."""
    made = {"byte_level": byte_level, "byte_fallback": byte_fallback}[manner]()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT)


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    train(made, pre_tokenizers.ByteLevel.alphabet())
    return made


def byte_fallback() -> Tokenizer:
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizers.Replace(" ", "▁")
    train(draft, ["▁"])
    learned = json.loads(draft.to_str())["model"]
    ids = learned["vocab"] | {f"<0x{b:02X}>": len(learned["vocab"]) + b for b in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token=END_OF_TEXT))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def train(made: Tokenizer, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False,
        limit_alphabet=300,
    )  # fmt: skip
    made.train_from_iterator([TEXT], trainer)


def pieces(manner: str, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    made = tokenizer(manner)
    detokenizer = Detokenizer(made, stop)
    given = [detokenizer.push(token) for token in made.encode(text, add_special_tokens=False)]
    return [*given, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("manner", MANNERS)
@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN + "▁"), min_size=1))
def test_pieces_join_to_the_text(manner: str, text: str) -> None:
    made = tokenizer(manner)
    whole = made.decode(made.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    assert "".join(pieces(manner, text)[0]) == whole


@pytest.mark.parametrize("manner", MANNERS)
def test_a_character_comes_whole(manner: str) -> None:
    given, _ = pieces(manner, UNICODE * 5)
    assert BROKEN not in "".join(given) and "".join(given) == UNICODE * 5
    assert "" in given, "no character was split over tokens: the test shows nothing"


@pytest.mark.parametrize("manner", MANNERS)
def test_text_goes_on_after_a_prompt_as_if_it_were_one(manner: str) -> None:
    made = tokenizer(manner)
    ids = made.encode(UNICODE + "some text here, and " * 4 + UNICODE, add_special_tokens=False)
    for cut in range(1, len(ids)):
        before = made.decode(ids[:cut], clean_up_tokenization_spaces=False).rstrip(BROKEN)
        whole = made.decode(ids, clean_up_tokenization_spaces=False)
        assert text_of(made, ids[cut:], ids[:cut]) == whole[len(before) :]


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n", max_size=40), st.lists(st.text("ab \n", min_size=1, max_size=5), max_size=3))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    given, detokenizer = pieces("byte_level", text, tuple(stop))
    hits = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    _, at, hit = min(hits, default=(0, len(text), None))
    assert "".join(given) == text[:at] and detokenizer.stopped == hit


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    made = tokenizer("byte_level")
    detokenizer = Detokenizer(made, ("###END",))
    spoken = [detokenizer.push(t) for t in made.encode("abc##", add_special_tokens=False)]
    assert "".join(spoken) == "abc"
    assert "".join(detokenizer.push(t) for t in made.encode("x", add_special_tokens=False)) == "##x"
    spoken = [detokenizer.push(t) for t in made.encode("y###END and more", add_special_tokens=False)]
    assert "".join(spoken) == "y" and detokenizer.stopped == "###END" and detokenizer.finish() == ""


def test_special_tokens_have_no_text() -> None:
    made = tokenizer("byte_level")
    end = made.eos_token_id
    assert isinstance(end, int)
    ids = made.encode("one two", add_special_tokens=False)
    assert text_of(made, [end, *ids, end]) == "one two"
