"""A tokenizer and a token stream are made once, come back exactly, and survive a race."""

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anabranch.errors import ConfigError
from anabranch.training import tokens
from anabranch.training.tokens import END_OF_TEXT, load_or_encode, load_or_train_tokenizer

TEXTS = [
    "the channel leaves the river\n" * 40,
    "and the channel rejoins the river\n" * 40,
    "naïve 🙂\t\r\n\x07",
]


@pytest.fixture
def tokenizer(tmp_path):
    return load_or_train_tokenizer(TEXTS, 280, tmp_path)


def test_the_tokenizer_has_the_asked_size_and_loads_as_any_other(tokenizer, tmp_path):
    (folder,) = tmp_path.iterdir()
    again = AutoTokenizer.from_pretrained(folder)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert len(again) == len(tokenizer) == 280
    assert again.eos_token == again.pad_token == again.bos_token == END_OF_TEXT
    assert again(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
    assert len(again(TEXTS[0]).input_ids) < len(TEXTS[0]) / 3


def test_any_text_comes_back_exactly(tokenizer):
    for text in [*TEXTS, "unseen: ﷽ \N{GREEK SMALL LETTER OMEGA}  \n\n x"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_is_trained_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_train", None)
    assert load_or_train_tokenizer(TEXTS, 280, tmp_path).get_vocab() == tokenizer.get_vocab()


def test_training_twice_gives_the_same_tokenizer(tokenizer, tmp_path):
    again = load_or_train_tokenizer(TEXTS, 280, tmp_path / "other")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(("texts", "size"), [(TEXTS, 281), (TEXTS[:2], 280), (["".join(TEXTS)], 280)])
def test_other_texts_or_sizes_are_another_tokenizer(tokenizer, tmp_path, texts, size):
    load_or_train_tokenizer(texts, size, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_first_four_megabytes_decide(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SAMPLE_BYTES", 1000)
    for last in ["one", "two"]:
        load_or_train_tokenizer(["ab " * 200, "cd " * 200, last], 270, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    load_or_train_tokenizer(["ab " * 200, "ef " * 200], 270, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size: 256 given, must be at least 257"):
        load_or_train_tokenizer(TEXTS, 256, tmp_path)


def test_a_process_that_comes_second_takes_the_tokenizer_of_the_first(tmp_path, monkeypatch):
    train = tokens._train
    first = []

    def slowly(sample, vocab_size):
        monkeypatch.setattr(tokens, "_train", train)
        first.append(load_or_train_tokenizer(TEXTS, 280, tmp_path))
        return train(sample, vocab_size)

    monkeypatch.setattr(tokens, "_train", slowly)
    second = load_or_train_tokenizer(TEXTS, 280, tmp_path)
    assert second.get_vocab() == first[0].get_vocab()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_put_in_place_is_an_error(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(target)

    monkeypatch.setattr(tokens.os, "rename", refuse)
    with pytest.raises(PermissionError):
        load_or_train_tokenizer(TEXTS, 280, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_the_texts_with_an_end_after_each(tokenizer, tmp_path):
    stream = load_or_encode(TEXTS, tokenizer, tmp_path)
    assert stream.ids_T.dtype == np.uint16
    assert tokenizer.decode(stream.ids_T) == END_OF_TEXT.join([*TEXTS, ""])


def test_long_texts_are_encoded_in_pieces_that_join_up(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokens, "PIECES", 3)
    texts = [*TEXTS, "x" * 170, "y" * 50, "z\n" * 25, ""]
    assert [text for text, _ in tokens._pieces("ab\ncd\n" + "x" * 60)] == ["ab\ncd\n", "x" * 50, "x" * 10]
    stream = load_or_encode(texts, tokenizer, tmp_path)
    assert tokenizer.decode(stream.ids_T) == END_OF_TEXT.join([*texts, ""])


def test_an_end_of_text_inside_a_text_does_not_end_it(tokenizer, tmp_path):
    text = f"one{END_OF_TEXT}two"
    stream = load_or_encode([text], tokenizer, tmp_path)
    assert (stream.ids_T == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(stream.ids_T) == text + END_OF_TEXT


def test_a_stream_is_encoded_once_and_another_one_for_other_texts(tokenizer, tmp_path, monkeypatch):
    first = load_or_encode(TEXTS, tokenizer, tmp_path)
    monkeypatch.setattr(tokens, "_encode", None)
    again = load_or_encode(TEXTS, tokenizer, tmp_path)
    assert again.digest == first.digest
    assert np.array_equal(again.ids_T, first.ids_T)
    monkeypatch.undo()
    digests = {load_or_encode(texts, tokenizer, tmp_path).digest for texts in [TEXTS[:2], ["".join(TEXTS)]]}
    assert len({first.digest, *digests}) == 3


def test_an_interrupted_encoding_leaves_no_stream(tokenizer, tmp_path, monkeypatch):
    def interrupted(file, ids_T):
        file.write(b"half")
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_or_encode(TEXTS, tokenizer, tmp_path)
    assert set(tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert tokenizer.decode(load_or_encode(TEXTS, tokenizer, tmp_path).ids_T).startswith(TEXTS[0])


def test_no_texts_are_an_empty_stream(tokenizer, tmp_path):
    assert load_or_encode([], tokenizer, tmp_path).ids_T.shape == (0,)


def test_ids_past_sixteen_bits_are_kept_in_thirty_two(tokenizer, tmp_path):
    tokenizer.add_tokens([f"word{n}" for n in range(66_000)])
    stream = load_or_encode(["word65999"], tokenizer, tmp_path)
    assert stream.ids_T.dtype == np.uint32
    assert stream.ids_T[0] == 280 + 65_999
